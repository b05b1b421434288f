"""Texts in the report: the mistakes with, on request, how much each word spoke for the predicted class. See ``graftwork.modality.Showing``."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graftwork.errors import UserError
from graftwork.modality import Index
from graftwork.texts import text_of

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from graftwork.batches import Examples
    from graftwork.dataset import Dataset
    from graftwork.execution import Execution
    from graftwork.model import Model

SHOWN = 600  # characters of a text
LAST_WORD = 30  # characters, by which less is shown for the last word to be a whole one
STEPS = 64  # from no words to the text
TOKENS_AT_ONCE = 2048  # through which gradients are taken
# Scripts that put no blanks between words: a tokenizer's pieces are the nearest there is to one.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
Floats = npt.NDArray[np.float32]


class Word(NamedTuple):
    """Characters ``start`` to ``end`` of a text, and the positions of their tokens."""

    start: int
    end: int
    tokens: list[int]


def mistakes(
    dataset: "Dataset", rows: "pa.Table", predicted: Index, model: "Model", folder: Path, attributions: bool = False
) -> list[dict[str, Any]]:
    """Return the first ``SHOWN`` characters of each of ``rows``, what is left out, how far the network read, and the weights of the words."""
    preprocess: Any = model.preprocess
    listed = []
    for data, target in zip(dataset.read(rows), predicted.tolist(), strict=True):
        text = text_of(data)
        end = cut(text)
        read = max(token.end for token in preprocess.tokens(text)) if preprocess.is_cut(text) else len(text)
        words = weights(model, text, target, end) if attributions else []
        listed.append({"text": text[:end], "left_out": len(text) - end, "read": min(read, end), "words": words})
    return listed


def cut(text: str, limit: int = SHOWN) -> int:
    """Return how many characters are shown: at most ``limit``, up to the end of a word if one is near, and never half of a character."""
    if len(text) <= limit:
        return len(text)
    for end in range(limit, limit - LAST_WORD, -1):
        if text[end].isspace():
            return end
    end = limit
    while end > limit - LAST_WORD and joined(text[end - 1], text[end]):
        end -= 1
    return end


def joined(before: str, after: str) -> bool:
    """Tell whether two characters are parts of one that is seen: letter and accent, or an emoji of several."""
    return unicodedata.category(after)[0] == "M" or "\N{ZERO WIDTH JOINER}" in (before, after)


# ---- which words spoke for the class -------------------------------------------------------------------------------------------------


def weights(model: "Model", text: str, target: int, end: int) -> list[list[Any]]:
    """Return [word, weight] for the words that the network read of the first ``end`` characters of ``text``."""
    preprocess: Any = model.preprocess
    tokens = preprocess.tokens(text)
    found = attributed(model, text, target)
    words = words_of(text, [(token.start, token.end) for token in tokens])
    values = [float(found[word.tokens].sum()) for word in words]
    most = max(map(abs, values), default=0.0) or 1.0
    return [
        [text[word.start : word.end], round(value / most, 3)]
        for word, value in zip(words, values, strict=True)
        if word.end <= end
    ]


def attributed(model: "Model", text: str, target: int, steps: int = STEPS) -> Floats:
    """Return how much each token that the network reads of ``text`` speaks for the class ``target``, float32 (tokens,).

    By integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365) on the word embeddings, from a text of padding alone, its
    special tokens kept. What is added up is the class's logit less the mean of all: the sum over the tokens is what the text changes of it.
    Not by input times gradient: BERT normalises its embeddings first, so the gradient is at right angles to their sum, whatever a word says. Measured
    with MiniLM on 20 texts that it was sure of: the three words named first, masked, take 0.054 from the probability, by that 0.021, by chance 0.015.
    """
    import torch
    from captum.attr import IntegratedGradients

    preprocess: Any = model.preprocess
    ids = preprocess.to_input(preprocess.stack([preprocess.example(text.encode())]), model.device)
    special = [token.start == token.end for token in preprocess.tokens(text)]
    network = model.network

    def centred(embeddings: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        logits = network(inputs_embeds=embeddings, mask=mask)
        centre: torch.Tensor = logits.mean(1, keepdim=True)
        return logits - centre

    with torch.no_grad():
        embeddings = network.embed(ids)
        nothing = torch.where(torch.tensor(special, device=model.device), ids, network.pad_id)
        baseline = network.embed(nothing)
    found = IntegratedGradients(centred).attribute(
        embeddings,
        baselines=baseline,
        target=target,
        additional_forward_args=(torch.ones_like(ids, dtype=torch.bool),),
        n_steps=steps,
        internal_batch_size=max(1, TOKENS_AT_ONCE // ids.shape[1]),
    )
    values: Floats = found.detach().float().sum(2)[0].cpu().numpy()
    return values


def words_of(text: str, offsets: list[tuple[int, int]]) -> list[Word]:
    """Join tokens, by the characters of ``text`` that they stand for, into words, in the order of the text; special tokens are in none."""
    words: list[Word] = []
    for position, (start, end) in enumerate(offsets):
        # Some tokenizers count the blank before a word as part of it.
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        if start == end:
            continue
        last = words[-1] if words else None
        if last and (start < last.end or (start == last.end and same_word(text[start - 1], text[start]))):
            words[-1] = Word(last.start, max(last.end, end), [*last.tokens, position])
        else:
            words.append(Word(start, end, [position]))
    return words


def same_word(before: str, after: str) -> bool:
    """Tell whether a word goes on from one character to the next."""
    if joined(before, after):
        return True
    letters = all(c.isalnum() or unicodedata.category(c)[0] == "M" or c in "'’_" for c in (before, after))
    return letters and not any(unicodedata.name(c, "").startswith(UNSPACED) for c in (before, after))


# ---- distortions: there are none -----------------------------------------------------------------------------------------------------


def check_corruptions(kinds: list[str]) -> None:
    """Refuse all.

    Raises:
        UserError: a kind is asked for.
    """
    if kinds:
        raise UserError(f"setting corruptions = {', '.join(kinds)}: distortions are for images; leave it out for texts")


def distorted(
    model: "Model",
    test: "Examples",
    targets: Index,
    kinds: list[str],
    execution: "Execution",
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    check_corruptions(kinds)
    return []
