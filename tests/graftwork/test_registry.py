"""The registry: one version a model, one champion, whatever happens at once or half-way."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from graftwork import registry
from graftwork.errors import UserError


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    from graftwork.tracking import quiet_mlflow

    quiet_mlflow()
    where = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    client_of(where).search_registered_models()  # makes the tables
    return where


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


def make(client: Any, name: str, quality: float, sha256: str = "") -> str:
    """Register a version of a model that is ``quality`` good; return its number."""
    import contextlib

    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):  # another has made it
        client.create_registered_model(name)

    def create(tags: dict[str, str]) -> Any:
        return client.create_model_version(name, "/nowhere", tags={**tags, "quality": str(quality)})

    return registry.one_version(client, name, sha256 or f"{quality:.6f}", "", create)


def better(client: Any, name: str, version: str, seconds: float = 0.0):
    """A gate that knows the truth: promote what is better than the champion of now."""

    def decide(champion: Any) -> dict[str, Any]:
        time.sleep(seconds)  # evaluating the champion takes its time
        mine = float(client.get_model_version(name, version).tags["quality"])
        theirs = float(champion.tags["quality"]) if champion else 0.0
        return {"promoted": mine > theirs, "reasons": [f"{mine} against {theirs}"], "rules": []}

    return decide


def settle(client: Any, name: str, version: str, **options: Any) -> dict[str, Any]:
    return registry.settle(client, name, version, better(client, name, version), **options)


def aliases(client: Any, name: str) -> dict[str, str]:
    return {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}


@pytest.mark.parametrize("name", ["line", "it's one", 'the "best"', 'it\'s the "best" 100% \\ one'])
def test_the_best_becomes_champion_and_the_former_is_kept(uri: str, name: str) -> None:
    """Without the former champion at hand, a bad night has no way back; nor where a name holds what MLflow's filters cannot escape."""
    client = client_of(uri)
    for quality in (0.5, 0.8, 0.6):
        settle(client, name, make(client, name, quality))
    assert aliases(client, name) == {"champion": "2", "previous": "1", "challenger": "3"}
    states = {row["version"]: row["state"] for row in registry.history(client, name)}
    assert states == {1: "promoted", 2: "promoted", 3: "refused"}


def test_two_that_beat_the_same_champion_do_not_both_win(uri: str) -> None:
    """The last writer would be champion, though the other is better."""
    name, number = "race", 8
    first = client_of(uri)
    settle(first, name, make(first, name, 0.1))
    failed: list[BaseException] = []

    def one(quality: float) -> None:
        try:
            client = client_of(uri)
            version = make(client, name, quality)
            registry.settle(client, name, version, better(client, name, version, 0.05))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(0.2 + n / 100,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    rows = registry.history(first, name)
    assert len(rows) == number + 1 and {row["state"] for row in rows} <= {"promoted", "refused"}
    best = max(first.search_model_versions(f"name = '{name}'"), key=lambda v: float(v.tags["quality"]))
    assert aliases(first, name)["champion"] == str(best.version)


def test_a_retried_registration_makes_no_second_version(uri: str) -> None:
    """A registry full of copies tells nobody which one is meant."""
    client = client_of(uri)
    assert make(client, "once", 0.5) == make(client, "once", 0.5) == "1"
    # The answer of a request was lost, and MLflow's client asked again.
    from functools import partial

    def twice(tags: dict[str, str]) -> None:
        for _ in range(2):
            client.create_model_version("once", "/nowhere", tags=tags)

    assert registry.one_version(client, "once", "other", "", partial(twice)) == "2"
    assert [int(v.version) for v in registry.search(client, "once")] in ([1, 2], [2, 1])


CALLS = ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias")


def die_at(uri: str, name: str, version: str, calls: int) -> None:
    """Settle, and kill the process at the ``calls``-th change that it makes in the registry."""
    client = client_of(uri)
    left = [calls]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # heartbeats come when they like
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for call in CALLS:
        setattr(client, call, counted(getattr(client, call)))
    registry.settle(client, name, version, better(client, name, version), lease=1.0)


def test_killed_at_any_point_the_next_try_ends_right(uri: str) -> None:
    """Killed between version and alias, a model would never be served, or two would claim the title."""
    client, killed = client_of(uri), 0
    for calls in range(12):
        name = f"killed {calls}"
        settle(client, name, make(client, name, 0.5))
        version = make(client, name, 0.7)
        client.set_registered_model_alias(name, "challenger", version)
        process = multiprocessing.get_context("spawn").Process(target=die_at, args=(uri, name, version, calls))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        killed += 1
        assert process.exitcode == -signal.SIGKILL
        champion = registry.find_champion(client, name)
        if str(champion.version) == version:  # what register() does with the champion's own weights
            registry.complete_promotion(client, champion)
        else:
            settle(client, name, version, lease=1.0)
        assert aliases(client, name) == {"champion": version, "previous": "1"}, calls
        assert {row["state"] for row in registry.history(client, name)} == {"promoted"}
    assert killed >= 5, "it was never in the midst of anything"


def test_the_dead_are_not_waited_for_and_may_come_back(uri: str) -> None:
    """One pod that was evicted would stop every registration after it."""
    client, name = client_of(uri), "dead"
    dead = make(client, name, 0.9)  # it never decides
    began = time.monotonic()
    settle(client, name, make(client, name, 0.5), lease=1.0)
    assert time.monotonic() - began < 10
    assert aliases(client, name) == {"champion": "2"}
    assert registry.history(client, name)[-1]["state"] == "abandoned"
    assert settle(client, name, dead, lease=1.0)["promoted"] is True
    assert aliases(client, name) == {"champion": dead, "previous": "2"}


def test_by_hand(uri: str) -> None:
    """The night that the new model is wrong, one command must bring the old one back, and keep it there."""
    client, name = client_of(uri), "by hand"
    for quality in (0.5, 0.8):
        settle(client, name, make(client, name, quality))
    assert registry.rollback(client, name) == ("2", "1")
    assert aliases(client, name) == {"champion": "1", "previous": "2"}
    assert registry.ROLLED_BACK in client.get_model_version(name, "2").tags
    assert registry.rollback(client, name) == ("1", "2")
    assert registry.ROLLED_BACK not in client.get_model_version(name, "2").tags
    assert registry.promote(client, name, "1", "the customer wants it") == "2"
    assert aliases(client, name) == {"champion": "1", "previous": "2"}
    assert "the customer wants it" in registry.history(client, name)[-1]["reason"]
    for mistake, words in (
        (lambda: registry.promote(client, name, "9", "x"), "has no version 9"),
        (lambda: registry.promote(client, name, "1", " "), "is empty"),
        (lambda: registry.rollback(client, "nobody"), "none of this name"),
        (lambda: registry.history(client, "nobody"), "none of this name"),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
    make(client, "alone", 0.5)
    with pytest.raises(UserError, match="has no champion"):
        registry.rollback(client, "alone")


def test_what_was_registered_by_hand_is_not_waited_for(uri: str) -> None:
    """A version that somebody put there has nobody who decides on it."""
    client = client_of(uri)
    client.create_registered_model("own")
    client.create_model_version("own", "/nowhere")
    settle(client, "own", make(client, "own", 0.5), lease=60)
    assert aliases(client, "own") == {"champion": "2"}


def test_a_long_decision_fits_into_a_tag() -> None:
    """A database that refuses the tag would stop the registration at its last step."""
    decision = {
        "promoted": False,
        "reasons": ["because " * 200] * 20,
        "rules": [{"rule": f"r{n}", "passed": True, "figures": {"a": 1}, "reason": "x" * 900} for n in range(10)],
        "policy": {"metric": "accuracy"},
    }
    assert len(registry.decision_text(decision)) <= 5000 and '"promoted": false' in registry.decision_text(decision)


def test_a_registry_that_is_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user would read a page of urllib3's."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="try again") as raised, registry.answering("http://127.0.0.1:9"):
        client_of("http://127.0.0.1:9").get_registered_model("x")
    assert "\n" not in str(raised.value)
