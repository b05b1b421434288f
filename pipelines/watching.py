"""``graftwork status``, ``logs`` and ``cancel``, and the wait for a run on a cluster."""

import contextlib
import difflib
import os
import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from graftwork.errors import UserError, one_line
from graftwork.pipelines.argo import FINISHED, Planned, Step, Try, steps_in, steps_of, words_of
from graftwork.pipelines.cluster import (
    PIPELINE,
    CertificateFile,
    Cluster,
    Host,
    Namespace,
    ServiceAccount,
    TokenFile,
    answering,
    cluster_at,
    equals,
    is_of,
    our_pipeline,
    pages,
)
from graftwork.pipelines.terminal import console, errors
from graftwork.tracking import shown_uri

POLL, OUTAGE = 5.0, 300.0  # seconds between looks at a run, and for how long a server may be away meanwhile
STYLES = {"SUCCEEDED": "green", "FAILED": "red", "CANCELED": "yellow", "CANCELING": "yellow", "RUNNING": "bold"}
MARKS = {"SUCCEEDED": "✓", "FAILED": "✗", "RUNNING": "…", "PENDING": "…", "CANCELED": "■", "CANCELING": "■"}
# What a step's log says of its end: our own line, or Python's; after it, KFP says that the step failed.
LAST_WORDS = re.compile(r"graftwork: |^[\w.]*(Error|Exception)\b")
NO_LOGS = ('{"error_message"', '{"error"', "<!doctype", "<html")  # what comes in the place of a log
RunId = Annotated[str, typer.Argument(help="Id or name of the run.", metavar="RUN")]
STATUS_EXAMPLES = """[bold]Examples[/]

graftwork status --host http://localhost:8080

graftwork status 2f0c6f7e-..."""


def status(
    run: Annotated[str, typer.Argument(help="Id or name of the run. Default: list the newest.", metavar="RUN")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Newest runs shown.")] = 20,
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Show how far a run on the cluster is, or the newest runs."""
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        if run:
            print_run(cluster, find_run(cluster, run))
        else:
            print_runs(cluster, limit)


def logs(
    run: RunId,
    step: Annotated[str, typer.Argument(help="fine-tune, ... Default: the one that failed, or the newest.")] = "",
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Print what a step of a run on the cluster wrote."""
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        found = find_run(cluster, run)
        chosen = chosen_step(steps_of(found, planned_steps(cluster, found)), step)
        text = read_log(cluster, found.run_id, chosen.tries[-1].pods)
        if text is None:
            raise UserError(
                f"log of {chosen.name}: the server does not have it (its pod may be gone, and no archive is set up); "
                f"try {kubectl(cluster, found.run_id, 'logs', chosen.tries[-1])}"
            )
    errors.print(escape(f"{chosen.label}, try {len(chosen.tries)}"), soft_wrap=True, highlight=False)
    typer.echo(text, nl=not text.endswith("\n"))


def cancel(
    run: RunId,
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Stop a run on the cluster."""
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        found = find_run(cluster, run)
        if found.state in FINISHED:
            raise UserError(f"run {one_line(run)}: has ended already ({found.state}); there is nothing to cancel")
        with answering(cluster.host, f"run {one_line(run)}"):
            cluster.client.terminate_run(found.run_id)
    say(f"Run {found.display_name} ({found.run_id}) is being stopped; graftwork status {found.run_id} says when it is")


# ---- a run on the server -------------------------------------------------------------------------------------------------------


def find_run(cluster: Cluster, text: str) -> Any:
    """Return the run of this id or, the newest, of this name."""
    import kfp_server_api

    with answering(cluster.host, f"run '{one_line(text)}'"):
        try:
            return cluster.client.get_run(text)
        except kfp_server_api.ApiException as error:
            if error.status not in (400, 404):
                raise
        options = {"namespace": cluster.namespace, "sort_by": "created_at desc", "filter": equals("display_name", text)}
        ours = our_pipeline(cluster)  # a name may be another team's as well
        named = next((run for run in pages(cluster.client.list_runs, "runs", **options) if is_of(run, ours)), None)
    if named is None:
        raise UserError(f"run '{one_line(text)}': there is none at {cluster.host}; 'graftwork status' lists the newest")
    return cluster.client.get_run(named.run_id)


def planned_steps(cluster: Cluster, run: Any) -> dict[str, Planned]:
    """Return the steps of the run's pipeline by their keys, in the order of their dependencies."""
    import kfp_server_api

    spec, reference = run.pipeline_spec, run.pipeline_version_reference
    if not spec and reference:
        with contextlib.suppress(kfp_server_api.ApiException):  # the version was deleted: what ran is told all the same
            spec = cluster.client.get_pipeline_version(
                reference.pipeline_id, reference.pipeline_version_id
            ).pipeline_spec
    spec = (spec or {}).get("pipeline_spec", spec or {})
    return steps_in(spec["root"]["dag"], spec["components"]) if "root" in spec else {}


def reason(cluster: Cluster, run: Any, step: Step) -> str:
    """Return why a step failed: the server's words, else the last words of its log, else where they are."""
    if step.said or not step.tries:
        return step.said or "the server does not say why"
    text = read_log(cluster, run.run_id, step.tries[-1].pods) or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if LAST_WORDS.search(line)]
    if not lines:
        return f"see {kubectl(cluster, run.run_id, 'describe', step.tries[-1])}"
    return one_line(shown_uri((ours or lines)[-1]), 300)


def kubectl(cluster: Cluster, run_id: str, verb: str, one: Try) -> str:
    """Return the command that shows a pod, by its run and its number: its whole name depends on the version of KFP."""
    of = f"kubectl -n {cluster.namespace or 'kubeflow'}"
    container = " -c main" if verb == "logs" else ""
    return f"{of} {verb}{container} $({of} get pods -o name -l pipeline/runid={run_id} | grep -- -{one.number})"


def read_log(cluster: Cluster, run_id: str, pods: tuple[str, ...]) -> str | None:
    """Return what a pod wrote, from KFP's API or from the server of its page; None: neither has it.

    KFP's API has the way from its first version and no other since; it answers with status 200 in any case, and an error as JSON.
    """
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    api = cluster.client.runs.run_service_get_run.__self__.api_client
    of_page = [("runid", run_id), ("podnamespace", cluster.namespace or "kubeflow")]
    ways: list[tuple[str, list[tuple[str, str]]]] = []
    ways += [(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", []) for pod in pods]
    ways += [("/k8s/pod/logs", [("podname", pod), *of_page]) for pod in pods]
    for path, query in ways:
        # An AttributeError: of a refusal, the SDK asks for headers as urllib3 1 had them.
        with contextlib.suppress(kfp_server_api.ApiException, HTTPError, AttributeError):
            answer = api.call_api(path, "GET", query_params=query, auth_settings=["Bearer"], _preload_content=False)
            text = str(answer.read().decode(errors="replace"))
            if not text.lstrip().lower().startswith(NO_LOGS):
                return text
    return None


# ---- shown ---------------------------------------------------------------------------------------------------------------------


def follow(cluster: Cluster, run_id: str) -> Any:
    """Wait for the end of a run and return it; on a terminal its steps are shown. A server that is away for a while is waited for."""
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    planned: dict[str, Planned] | None = None
    away = 0.0
    try:
        with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
            while True:
                try:
                    run = cluster.client.get_run(run_id)
                    planned = planned_steps(cluster, run) if planned is None else planned
                    away = 0.0
                except (kfp_server_api.ApiException, HTTPError) as error:
                    away = away or time.monotonic()
                    if not may_pass(error) or time.monotonic() - away > OUTAGE:
                        raise
                else:
                    if live is not None:
                        live.update(steps_table(steps_of(run, planned)), refresh=True)
                    if run.state in FINISHED:
                        return run
                time.sleep(POLL)
    except KeyboardInterrupt:
        errors.print(f"[yellow]graftwork: the run goes on; 'graftwork cancel {run_id}' stops it[/]", soft_wrap=True)
        raise


def may_pass(error: Exception) -> bool:
    """Whether a failure may be over in a while: no answer, or one that says so."""
    status = getattr(error, "status", None)
    return status is None or status in (0, 408, 429) or status >= 500


def report_end(cluster: Cluster, run: Any) -> None:
    """Say how a run ended; exit status 1 where it did not succeed."""
    if run.state == "SUCCEEDED":
        say(f"Succeeded in {duration(run)}")
        print_links(cluster, run)
        return
    failed = [step for step in steps_of(run, planned_steps(cluster, run)) if step.state == "FAILED"]
    where = f" in step {failed[0].name}: {reason(cluster, run, failed[0])}" if failed else ""
    said = words_of([run])
    what = {"CANCELED": "was canceled", "SKIPPED": "was skipped"}.get(run.state, "failed")
    text = f"run {run.run_id} {what}{where}" + (f": {said}" if said and not where else "")
    errors.print(f"[red]graftwork: {escape(one_line(text, 1000))}[/]", soft_wrap=True, highlight=False)
    raise typer.Exit(1)


def print_run(cluster: Cluster, run: Any) -> None:
    steps = steps_of(run, planned_steps(cluster, run))
    say(f"{run.display_name} ({run.run_id})")
    style = STYLES.get(run.state, "")
    console.print(
        f"[{style}]{run.state}[/] {duration(run)}" if style else f"{run.state} {duration(run)}", highlight=False
    )
    console.print(steps_table(steps))
    for step in steps:
        if step.state == "FAILED":
            say(f"{step.name}: {reason(cluster, run, step)}")
        elif step.state == "PENDING" and step.tries:
            waits = step.said or "waits for a node, or for its image"
            say(f"{step.name}: {waits}; see {kubectl(cluster, run.run_id, 'describe', step.tries[-1])}")
    if not any(step.state == "FAILED" for step in steps) and words_of([run]):
        say(words_of([run]))
    print_links(cluster, run)


def steps_table(steps: list[Step]) -> Group:
    table = Table.grid(padding=(0, 2))
    for step in steps:
        state = "reused" if step.cached else step.state.lower() or "-"
        tries = f"try {len(step.tries)}" if len(step.tries) > 1 else ""
        seconds = "" if step.seconds is None else f"{step.seconds:.0f} s"
        style = STYLES.get(step.state, "dim")
        table.add_row(f"[{style}]{MARKS.get(step.state, ' ')}[/]", escape(step.label), state, tries, seconds)
    return Group(table)


def print_runs(cluster: Cluster, limit: int) -> None:
    """List the newest runs of our pipeline."""
    pipeline = our_pipeline(cluster)
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "name", "state", "began", "took"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("run", "state"))
    shown = 0
    for run in pages(cluster.client.list_runs, "runs", 5000, namespace=cluster.namespace, sort_by="created_at desc"):
        if not is_of(run, pipeline):
            continue
        began = f"{run.created_at.astimezone():%Y-%m-%d %H:%M}" if run.created_at else ""
        style = STYLES.get(run.state, "")
        state = f"[{style}]{run.state}[/]" if style else str(run.state)
        table.add_row(run.run_id, escape(one_line(run.display_name)), state, began, duration(run))
        shown += 1
        if shown == limit:
            break
    if not shown:
        say(f"No runs of {PIPELINE} at {cluster.host}; 'graftwork submit' makes one")
        return
    console.print(table)


def chosen_step(steps: list[Step], name: str) -> Step:
    """Return the step of this name; with no name the one that failed, else the newest that has begun."""
    begun = [step for step in steps if step.tries]
    if name:
        wanted = name.lower().replace("_", "-")
        found = next((step for step in steps if step.name == wanted), None)
        if found is None:
            names = [step.name for step in steps]
            near = difflib.get_close_matches(wanted, names, n=1)
            raise UserError(
                f"step '{one_line(name)}': the run has none of this name; "
                + (f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none yet'}")
            )
        if not found.tries:
            why = "was reused from an earlier run, and wrote nothing" if found.cached else "has not begun"
            raise UserError(f"step {found.name}: {why}; see 'graftwork status RUN'")
        return found
    if not begun:
        raise UserError("the run has no step that has begun; see 'graftwork status RUN'")
    return next((step for step in begun if step.state == "FAILED"), begun[-1])


def print_links(cluster: Cluster, run: Any) -> None:
    say(page_of(cluster, run.run_id))
    for name, output in (run.plugins_output or {}).items():
        title = "MLflow" if name == "mlflow" else name
        entry = (output.entries or {}).get("run_url")
        if output.state == "PLUGIN_FAILED":
            say(
                f"{title} did not take the run: {one_line(shown_uri(output.state_message or 'it does not say why'), 300)}"
            )
        elif entry is not None and entry.value:
            say(f"{title}: {shown_uri(str(entry.value))}")


def page_of(cluster: Cluster, run_id: str) -> str:
    """Return the link to a run in KFP's page, which may have another address than the API."""
    page = os.environ.get("KF_PIPELINES_UI_ENDPOINT", "").rstrip("/") or cluster.host
    return f"{page}/#/runs/details/{run_id}"


def duration(run: Any) -> str:
    ended = run.finished_at if run.finished_at and run.finished_at.year > 1970 else None
    if run.created_at is None or (run.state in FINISHED and ended is None):
        return ""
    seconds = max(0, round(((ended or datetime.now(UTC)) - run.created_at).total_seconds()))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"


def say(*lines: str) -> None:
    for line in lines:
        console.print(escape(one_line(line, 600)), highlight=False, soft_wrap=True)
