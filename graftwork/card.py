"""The model card (Mitchell et al. 2019): Markdown, from the facts of a run alone, as a registered version's description."""

from typing import Any

from graftwork.report import TITLES, gain_in_words


def model_card(
    result: dict[str, Any],
    dataset: dict[str, Any],
    model: dict[str, Any],
    outcome: dict[str, Any] | None,
    name: str,
    limit: int = 5000,
) -> str:
    """Return the card of the chosen model, at most ``limit`` characters: the tables by class are shortened first, and it says so.

    ``outcome`` is what ``graftwork.register.register`` decided, once it has.
    """
    classes = len(result["classes"])
    for shown in (classes, 20, 10, 5, 0):
        text = card(result, dataset, model, outcome, name, min(shown, classes))
        if len(text) <= limit:
            return text
    cut = text[:limit]
    return cut[: cut.rfind("\n## ")].rstrip() + "\n" if "\n## " in cut else cut[:limit].rsplit("\n", 1)[0] + "\n"


def card(
    result: dict[str, Any],
    dataset: dict[str, Any],
    model: dict[str, Any],
    outcome: dict[str, Any] | None,
    name: str,
    shown: int,
) -> str:
    """Return the card with a table of the ``shown`` worst classes."""
    from graftwork.modality import inputs, name_of, transforms
    from graftwork.report import render_text
    from graftwork.sources.record import NOUNS

    chosen = result["candidates"][result["chosen"]]
    by_class = sorted(
        chosen["test"]["per_class"], key=lambda one: (one["recall"] is None, one["recall"] or 0, one["class"])
    )
    kind = inputs(model)
    champion = (outcome or {}).get("champion")
    registered = (outcome or {}).get("registered")
    # The champion is another model where this one is not promoted.
    place = (
        f"/{registered['version']}" if outcome and registered and not outcome["decision"]["promoted"] else "@champion"
    )
    rivals = [(TITLES.get(rival, rival), gain_in_words(found)) for rival, found in result["comparisons"].items()]
    if champion and champion["comparison"]:
        rivals.insert(0, (f"the champion, version {champion['version']}", gain_in_words(champion["comparison"])))
    return render_text(
        "model_card.md",
        result=result,
        dataset=dataset,
        model=model,
        outcome=outcome,
        name=name,
        place=place,
        one=chosen,
        test=chosen["test"],
        rivals=rivals,
        by_class=by_class[:shown],
        left_out=len(by_class) - shown,
        worst=by_class[0],
        worse=[piece for piece in result["slices"] if piece["worse"]][:3],
        noun=NOUNS[name_of(model)],
        modality=name_of(model),
        size=kind.size_in_words(model["preprocess"]),
        column=kind.COLUMN,
        use=kind.USE,
        library=transforms(model).LIBRARIES[0],
        counts={split: sum(held.values()) for split, held in dataset["counts"].items()},
    )
