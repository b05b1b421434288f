"""``graftwork promote``, ``rollback`` and ``history``, as a user types them, and a rollback that is killed."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graftwork import registry
from graftwork.errors import UserError
from graftwork.pipelines.cli import app

WRITES = (
    "set_registered_model_tag",
    "set_model_version_tag",
    "set_registered_model_alias",
    "delete_model_version_tag",
    "delete_registered_model_tag",
)


class Killed(BaseException):
    """What no handler of ours catches, as a SIGKILL."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose registry holds the model "flowers" with two versions, the second of them champion."""
    folder = tmp_path_factory.mktemp("runs é 1")
    client = client_of(folder)
    two_versions(client, "flowers")
    return folder


def client_of(output: Path) -> Any:
    from graftwork.tracking import quiet_mlflow, tracking_uri

    quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(output), tracking_uri(output))


def two_versions(client: Any, name: str) -> None:
    client.create_registered_model(name)
    for version in ("1", "2"):
        client.create_model_version(name, "/nowhere")
        registry.promote(client, name, version, "a start")


def said(output: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_back_and_forth_as_typed(output: Path) -> None:
    """In the night that the new model is wrong, nobody has time for a command that does not do what it says."""
    client = client_of(output)
    said(output, "rollback", "flowers")
    assert str(registry.find_champion(client, "flowers").version) == "1"
    assert "rolled back" in said(output, "history", "flowers")
    said(output, "promote", "flowers", "2", "--reason", "[the light] was off")
    assert str(registry.find_champion(client, "flowers").version) == "2"
    shown = said(output, "history", "flowers")
    assert "the light" in shown and "rolled back" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollback", "nobody"], "none of this name"),
        (["history", "nobody"], "none of this name"),
        (["promote", "nobody", "1", "--reason", "x"], "has no version 1"),
        (["promote", "flowers", "77", "--reason", "x"], "has no version 77"),
        (["promote", "flowers", "1", "--reason", " "], "--reason: is empty"),
    ],
)
def test_mistakes_are_one_line(output: Path, arguments: list[str], message: str) -> None:
    """A typing mistake would end in a trace of MLflow's."""
    with pytest.raises(UserError, match=message) as raised:
        said(output, *arguments)
    assert "\n" not in str(raised.value)


def test_no_registry_and_a_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question would make an empty database, or hang, where the answer is a wrong address."""
    with pytest.raises(UserError, match="there is none at"):
        said(tmp_path, "history", "flowers")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nothing listens there
    for arguments in (["history", "x"], ["rollback", "x"], ["promote", "x", "1", "--reason", "y"]):
        with pytest.raises(UserError, match="try again") as raised:
            said(tmp_path, *arguments)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("twice", [False, True])
def test_a_rollback_killed_anywhere_is_finished_by_the_next(output: Path, twice: bool) -> None:
    """The second try of a rollback would bring back the bad model, or leave it without a mark for the gate."""
    client, killed = client_of(output), 0
    out, back = ("1", "2") if twice else ("2", "1")
    for calls in range(10):
        name = f"killed {twice} {calls}"
        two_versions(client, name)
        if twice:
            registry.rollback(client, name)
        try:
            registry.rollback(dying(client, calls), name)
        except Killed:
            killed += 1
            registry.rollback(client, name)
        model = client.get_registered_model(name)
        assert {alias: str(v) for alias, v in model.aliases.items()} == {"champion": back, "previous": out}, calls
        marked = [v for v in "12" if registry.ROLLED_BACK in client.get_model_version(name, v).tags]
        assert marked == [out] and registry.ROLLBACK not in model.tags, calls
    assert killed == (6 if twice else 5)


def dying(client: Any, calls: int) -> Any:
    """A client that ends its process, as far as the caller can tell, instead of the ``calls``-th change in the registry."""
    left = [calls]

    class Dying:
        def __getattr__(self, name: str) -> Any:
            if name in WRITES:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return getattr(client, name)

    return Dying()


def test_a_rollback_that_was_given_up_does_not_come_back_later(output: Path) -> None:
    """Days later, another rollback would finish the old one, and take the right model out of service."""
    client = client_of(output)
    two_versions(client, "given up")
    with pytest.raises(Killed):
        registry.rollback(dying(client, 1), "given up")
    registry.promote(client, "given up", "1", "by hand instead")
    assert registry.rollback(client, "given up") == ("1", "2")
    assert str(registry.find_champion(client, "given up").version) == "2"
