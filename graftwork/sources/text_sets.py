"""Named datasets that are a few texts. Adding one is a function that returns its records, and a line in ``NAMED``."""

import hashlib
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, one_line
from graftwork.parallel import WORKERS
from graftwork.sources.record import AS_IT_IS, DataSource, Reading, Record, Text, exists, printable

TOPIC_SENTENCES = 40  # fewest of a topic: with fewer, its test set would be some eight sentences
GROUP_SENTENCES = 10  # most that a conversation holds together; a longer one is a list, as of jokes


def open_text_set(uri: str, reading: Reading = AS_IT_IS) -> DataSource | None:
    """Return the dataset named ``uri``; a folder of that name goes before it."""
    return TextSet(uri) if uri in NAMED and not exists(Path(uri)) else None


class TextSet:
    modality = "text"
    readers = WORKERS

    def __init__(self, name: str) -> None:
        self.name = name
        self._records = NAMED[name]()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"texts\0{self.name}\n".encode())
        for record in self._records:
            digest.update(f"{record.label}\0{record.group}\0".encode() + record.content.read() + b"\n")
        return digest.hexdigest()[:32]

    def records(self) -> Iterator[Record]:
        yield from self._records

    def __len__(self) -> int:
        return len(self._records)

    def skipped(self) -> dict[str, int]:
        return {}


def chatterbot_topics() -> list[Record]:
    """1,647 English sentences of small talk on 12 topics, of the package chatterbot-corpus (BSD licence, Gunther Cox and others).

    The topic is the file's name. Sentences that differ in letters' case and blanks alone are one, and one that occurs under several topics
    is left out, since nobody could tell its topic; so are topics of fewer than ``TOPIC_SENTENCES``. A group is the first utterance of the
    conversation in which a sentence comes first: a question and its answers stay in one split.
    """
    import yaml

    folder = package_folder("chatterbot-topics", "chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast
    topics: dict[str, set[str]] = defaultdict(set)
    first: dict[str, tuple[str, str, str]] = {}  # by the sentence in small letters: sentence, topic, group
    try:
        files = sorted(folder.glob("*.yml"))
        for file in files:
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - a safe one
            for conversation in content["conversations"]:
                utterances = conversation if isinstance(conversation, list) else [conversation]
                # YAML takes an unquoted 1984 or "no" for a number or a truth value.
                sentences = [" ".join(as_yaml_writes(utterance).split()) for utterance in utterances]
                opening = sentences[0].casefold() if sentences else ""
                for sentence in filter(None, sentences):
                    topics[sentence.casefold()].add(file.stem)
                    first.setdefault(sentence.casefold(), (sentence, file.stem, opening))
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise UserError(
            f"data chatterbot-topics: the package in {one_line(folder)} cannot be read ({one_line(error, 120)}); "
            "install it again: pip install --force-reinstall chatterbot-corpus"
        ) from None
    alone = [found for key, found in first.items() if len(topics[key]) == 1]
    in_topic = Counter(topic for _, topic, _ in alone)
    in_group = Counter(group for _, topic, group in alone if in_topic[topic] >= TOPIC_SENTENCES)
    number: Counter[str] = Counter()
    records = []
    for sentence, topic, group in alone:
        if in_topic[topic] >= TOPIC_SENTENCES:
            number[topic] += 1
            group = group if in_group[group] <= GROUP_SENTENCES else ""
            key = f"{printable(topic)}/{number[topic]:04d}.txt"
            records.append(Record(key, printable(topic), "", Text(sentence), group))
    if len(number) < 2:
        raise UserError(
            f"data chatterbot-topics: {len(number)} topics in {one_line(folder)}, where files must be missing; "
            "install it again: pip install --force-reinstall chatterbot-corpus"
        )
    return records


def as_yaml_writes(value: Any) -> str:
    """Return what YAML read as text, a truth value in the word that is likeliest to have been written."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "" if value is None else str(value)


def package_folder(name: str, module: str, package: str) -> Path:
    """Return the folder of an installed package, which is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data {name}: needs the package {package}, which is not installed; pip install {package}")
    return Path(next(iter(spec.submodule_search_locations)))


NAMED: dict[str, Callable[[], list[Record]]] = {"chatterbot-topics": chatterbot_topics}
