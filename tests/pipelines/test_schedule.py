"""``graftwork schedule``: the real client and the real compiler, over HTTP."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kfp_server import Server, serve
from typer.testing import CliRunner

from graftwork.errors import UserError
from graftwork.pipelines import cluster
from graftwork.pipelines.cli import app

DATA = "s3://bucket/photos"
SUNDAYS = ("create", "sundays", "--cron", "0 3 * * 0", "--data", DATA)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*cluster.HOST_VARIABLES, cluster.TOKEN_VARIABLE, "MLFLOW_EXPERIMENT_NAME", "GRAFTWORK_KFP_TIMEZONE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def template() -> dict[str, dict[str, Any]]:
    """What a server holds after one schedule was made; compiling for each test would take a second or two."""
    with serve() as running:
        schedule(running, *SUNDAYS)
        return {name: dict(getattr(running, name)) for name in ("pipelines", "versions", "experiments", "schedules")}


@pytest.fixture
def filled(server: Server, template: dict[str, dict[str, Any]]) -> Server:
    """A server with the schedule "sundays"."""
    for name, rows in template.items():
        getattr(server, name).update({key: dict(row) for key, row in rows.items()})
    return server


def schedule(server: Server, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["schedule", *arguments, "--host", server.host], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(server: Server, *arguments: str) -> str:
    """Run a command that must be refused, and return its line."""
    with pytest.raises(UserError) as error:
        CliRunner().invoke(app, ["schedule", *arguments, "--host", server.host], catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def another_pipelines(server: Server, name: str) -> str:
    """Put a schedule of another team's on the server, and return its id."""
    row = dict(next(iter(server.schedules.values())))
    row |= {"recurring_run_id": "theirs", "display_name": name, "created_at": server.created()}
    row["pipeline_version_reference"] = {"pipeline_id": "x", "pipeline_version_id": "y"}
    server.schedules["theirs"] = row
    return "theirs"


def test_a_schedule_is_made_and_told(server: Server) -> None:
    """Every Sunday at three could be something else, without anybody being told until it has not happened."""
    said = schedule(server, *SUNDAYS)
    assert "When: At 03:00 on Sunday, UTC" in said
    times = re.findall(r"Sun (\d{4}-\d\d-\d\d) 03:00 UTC", said)
    days = [datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC) for day in times]
    assert len(days) == 3 and days[0] > datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    assert {day.weekday() for day in days} == {6} and (days[2] - days[0]).days == 14
    (row,) = server.schedules.values()
    assert row["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 0"}}
    assert (row["no_catchup"], row["max_concurrency"], row["mode"]) == (True, "1", "ENABLE")
    assert row["plugins_input"] == {"mlflow": {"experiment_name": "graftwork"}}
    assert row["runtime_config"]["parameters"]["data"] == DATA
    assert [line.partition("?")[0].partition(" ->")[0] for line in server.changes()] == [
        "POST /apis/v2beta1/experiments",
        "POST /apis/v2beta1/pipelines",
        "POST /apis/v2beta1/pipelines/upload_version",
        "POST /apis/v2beta1/recurringruns",
    ]


def test_a_time_zone_is_carried_over_and_told(filled: Server) -> None:
    """Three o'clock in Tokyo would be three o'clock in Greenwich, noon in Tokyo."""
    said = schedule(filled, "create", "tokyo", "--cron", "0 3 * * 0", "--timezone", "Asia/Tokyo", "--data", DATA)
    assert "At 03:00 on Sunday, Asia/Tokyo; KFP has it as '0 0 18 * * 6', UTC" in said
    assert len(re.findall(r"Sun \d{4}-\d\d-\d\d 03:00 JST", said)) == 3
    row = next(row for row in filled.schedules.values() if row["display_name"] == "tokyo")
    assert row["trigger"]["cron_schedule"]["cron"] == "0 0 18 * * 6"


def test_a_cluster_in_another_time_zone(filled: Server) -> None:
    """Where KFP's controller runs in Berlin's time, summer time can be kept."""
    zone = ("--timezone", "Europe/Berlin", "--cluster-timezone", "Europe/Berlin")
    said = schedule(filled, "create", "berlin", "--cron", "0 3 * * 0", *zone, "--data", DATA)
    assert "At 03:00 on Sunday, Europe/Berlin" in said and "KFP has it" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cron", "0 0 30 2 *"], "cron '0 0 30 2 *': never fires"),
        (["--cron", "0 3 * *"], "has 4 fields"),
        (["--cron", "0 3 * * 8"], "is no weekday"),
        (["--cron", "0 3 * * 0", "--timezone", "Europe/Berln"], "did you mean Europe/Berlin?"),
        (["--cron", "0 3 * * 0", "--timezone", "Europe/Berlin"], "KFP keeps its schedules in UTC"),
        (["--cron", "0 3 * * 0", "--set", "batchsize=3"], "did you mean batch_size?"),
        (["--cron", "0 3 * * 0", "--gpu-pool", "gcp"], "gpu pool 'gcp'"),
        (["--cron", "0 3 * * 0", "--data", "/photos"], "lies on this machine"),
        (["--cron", "0 3 * * 0", "--set", f"classes={'x' * 10_000},y"], "setting classes: has 10,0"),
    ],
)
def test_a_mistake_is_told_before_the_first_request(arguments: list[str], message: str, server: Server) -> None:
    """A schedule that cannot work is found out a week later."""
    assert message in refused(server, "create", "sundays", "--data", DATA, *arguments)
    assert server.log == []


def test_a_name_that_is_taken(filled: Server) -> None:
    """KFP takes a second schedule of the same name: the model would be trained twice each Sunday."""
    line = refused(filled, *SUNDAYS)
    assert "schedule 'sundays': there is one of this name already" in line and "--replace" in line
    assert filled.changes() == []


def test_replacing_leaves_one(filled: Server) -> None:
    """A change of the hour would leave the old hour as well; and none, if the new one is refused."""
    (before,) = filled.schedules
    filled.fail(500, "/recurringruns", "POST", times=1)
    refused(filled, "create", "sundays", "--cron", "0 4 * * 0", "--data", DATA, "--replace")
    assert list(filled.schedules) == [before]
    said = schedule(filled, "create", "sundays", "--cron", "0 4 * * 0", "--data", DATA, "--replace")
    (row,) = filled.schedules.values()
    assert row["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * 0" and "in place of the one before" in said


def test_another_teams_schedule_is_not_touched(filled: Server) -> None:
    """On a shared server a name is soon taken twice: deleting or replacing ours would delete theirs."""
    key = another_pipelines(filled, "sundays")
    before = dict(filled.schedules[key])
    assert "another pipeline has one of this name" in refused(filled, *SUNDAYS, "--replace")
    assert schedule(filled, "list").count("sundays") == 1
    schedule(filled, "pause", "sundays")
    schedule(filled, "delete", "sundays")
    assert filled.schedules == {key: before}


def test_paused_resumed_and_deleted(filled: Server) -> None:
    """While the data are mended, nothing must be trained on them; and afterwards it must be again."""
    (key,) = filled.schedules
    schedule(filled, "pause", "sundays")
    assert filled.schedules[key]["status"] == "DISABLED"
    shown = schedule(filled, "list")
    assert "paused" in shown and "At 03:00 on Sunday, UTC" in shown and DATA in shown
    assert re.search(r"next: Sun \d{4}-\d\d-\d\d 03:00 UTC", schedule(filled, "resume", "sundays"))
    assert filled.schedules[key]["status"] == "ENABLED"
    assert re.search(r"sundays +on +At 03:00 on Sunday, UTC +Sun \d{4}", schedule(filled, "list"))
    schedule(filled, "delete", "sundays")
    assert filled.schedules == {}
    assert "No schedules" in schedule(filled, "list")


@pytest.mark.parametrize("command", ["pause", "resume", "delete"])
def test_a_name_that_there_is_not(command: str, filled: Server) -> None:
    """After a typing mistake the schedule would go on, and the user think that it does not."""
    line = refused(filled, command, "sunday")
    assert "schedule 'sunday': there is none of this name" in line and "did you mean sundays?" in line
    assert filled.changes() == []


@pytest.mark.parametrize("command", ["pause", "resume", "delete"])
def test_a_schedule_that_may_not_be_touched(command: str, filled: Server) -> None:
    """A user without the right would read a trace, and not know whether it is done."""
    (key,) = filled.schedules
    filled.fail(403, key, message="User 'ada' is not authorized")
    assert "schedule 'sundays': not allowed (403: User 'ada' is not authorized)" in refused(filled, command, "sundays")
    assert filled.schedules[key]["status"] == "ENABLED"


def test_schedules_beyond_the_first_page_are_found(filled: Server) -> None:
    """From the hundredth schedule of a server on, a name would be called free and a schedule not there."""
    (row,) = filled.schedules.values()
    for n in range(250):
        filled.schedules[f"k{n}"] = {
            **row,
            "recurring_run_id": f"k{n}",
            "display_name": f"s{n}",
            "created_at": f"2026-12-01T00:{n // 60:02d}:{n % 60:02d}Z",
        }
    schedule(filled, "pause", "s249")
    assert filled.schedules["k249"]["status"] == "DISABLED"


def test_schedules_of_other_kinds_are_shown(filled: Server) -> None:
    """One schedule that was made by hand, by interval or with five fields, would hide all the others behind a trace."""
    (row,) = filled.schedules.values()
    others = {
        "interval": {"periodic_schedule": {"interval_second": "3600"}},
        "five": {"cron_schedule": {"cron": "0 30 4 1 *"}},  # KFP takes the first for the seconds
        "every": {"cron_schedule": {"cron": "@every 2h"}},
        "empty": {},
    }
    for n, (name, trigger) in enumerate(others.items()):
        filled.schedules[name] = {
            **row,
            "recurring_run_id": name,
            "display_name": name,
            "trigger": trigger,
            "created_at": f"2026-12-01T00:00:{n:02d}Z",
        }
    shown = {line.split()[0]: line for line in schedule(filled, "list").splitlines()[1:]}
    assert "every 3600 s" in shown["interval"] and "@every 2h" in shown["every"]
    assert "04:30 on the first day of every month" in shown["five"] and "empty" in shown


def test_a_connection_that_breaks_makes_no_second_schedule(filled: Server) -> None:
    """The model would be trained twice each Sunday."""
    filled.fail(0, "/recurringruns", "POST")
    line = refused(filled, "create", "mondays", "--cron", "0 3 * * 1", "--data", DATA)
    assert "look with 'graftwork schedule list' whether it is there" in line
    assert [entry.method for entry in filled.log if entry.path.endswith("/recurringruns")].count("POST") == 1


def test_a_server_without_plugins_takes_a_schedule_too(filled: Server) -> None:
    """From KFP 2.0 to 2.16 nothing could be scheduled."""
    filled.plugins = False
    schedule(filled, "create", "mondays", "--cron", "0 3 * * 1", "--data", DATA)
    assert len(filled.schedules) == 2


def test_a_file_of_settings_serves_a_schedule_too(filled: Server, tmp_path: Path) -> None:
    """What was tried with submit would have to be typed anew."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"data: {DATA}\nepochs: 3\n")
    schedule(filled, "create", "mondays", "--cron", "@weekly", "--params", str(file), "--run-as", "graftwork-runner")
    row = next(row for row in filled.schedules.values() if row["display_name"] == "mondays")
    assert row["runtime_config"]["parameters"]["epochs"] == 3 and row["service_account"] == "graftwork-runner"
    assert row["trigger"]["cron_schedule"]["cron"] == "0 0 0 * * 0"
