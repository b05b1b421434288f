"""``graftwork schedule``: the pipeline again and again on a Kubeflow cluster, one run at a time and none for the times that were missed."""

from datetime import datetime
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer
from rich.markup import escape
from rich.table import Table

from graftwork.errors import UserError, one_line
from graftwork.pipelines import cron as crons
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
    is_of,
    our_pipeline,
    pages,
)
from graftwork.pipelines.submit import (
    Assignments,
    Backbone,
    Data,
    Epochs,
    Experiment,
    Gpu,
    GpuCount,
    GpuPool,
    Image,
    ImageSize,
    ParameterFile,
    PolicyFile,
    Preprocess,
    Priority,
    Queue,
    RegisterAs,
    RunAs,
    ScratchControl,
    Seed,
    Spot,
    StrategyName,
    Suite,
    TestPerClass,
    TrainPerClass,
    Volume,
    Weights,
    find_places,
    make_once,
    packaged,
    start_of,
    wanted_run,
    warn_of_tag,
)
from graftwork.pipelines.terminal import console
from graftwork.pipelines.watching import say

schedule_app = typer.Typer(help="Run the pipeline again and again on a Kubeflow cluster.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of the schedule.", metavar="NAME")]
TimeZone = Annotated[str, typer.Option("--timezone", help="Time zone that --cron is in. Default: that of the cluster.")]
ClusterZone = Annotated[
    str,
    typer.Option(
        envvar="GRAFTWORK_KFP_TIMEZONE",
        help="Time zone of KFP's controller: CRON_SCHEDULE_TIMEZONE of deployment/ml-pipeline-scheduledworkflow.",
    ),
]


@schedule_app.command(
    epilog="""[bold]Examples[/]

graftwork schedule create sundays --cron "0 3 * * 0" --data s3://bucket/photos --host http://localhost:8080

graftwork schedule create daily --cron "30 9 * * mon-fri" --timezone Asia/Tokyo --data s3://bucket/photos --gpu-pool gke --gpu nvidia-l4 --spot"""
)
def create(
    schedule: Name,
    cron: Annotated[
        str, typer.Option(help="MINUTE HOUR DAY MONTH WEEKDAY, or six fields with the seconds first, or @weekly.")
    ],
    timezone: TimeZone = "",
    cluster_timezone: ClusterZone = "UTC",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of the schedule of this name.")] = False,
    data: Data = None,
    params: ParameterFile = None,
    backbone: Backbone = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    preprocess: Preprocess = None,
    strategy: StrategyName = None,
    epochs: Epochs = None,
    train_per_class: TrainPerClass = None,
    test_per_class: TestPerClass = None,
    seed: Seed = None,
    register_as: RegisterAs = None,
    with_scratch_control: ScratchControl = False,
    suite: Suite = None,
    policy: PolicyFile = None,
    set_: Assignments = None,
    gpu_pool: GpuPool = "",
    gpu: Gpu = "",
    gpu_count: GpuCount = 1,
    spot: Spot = False,
    image: Image = "",
    experiment: Experiment = "graftwork",
    volume: Volume = "graftwork-checkpoints",
    queue: Queue = "",
    priority: Priority = "",
    run_as: RunAs = "",
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Make a schedule. It keeps this version of the pipeline and these settings until it is replaced."""
    options = dict(locals())
    if not schedule.strip():
        raise UserError("NAME: is empty; give the schedule a name")
    expression = crons.parse(cron)
    kfp = crons.find_zone(cluster_timezone)
    zone = crons.find_zone(timezone) if timezone else kfp
    there = crons.in_zone_of_kfp(expression, zone, kfp)
    wanted = wanted_run(options)
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        before = [row for row in all_schedules(cluster) if row.display_name == schedule]
        ours = our_pipeline(cluster)
        if not all(is_of(row, ours) for row in before):
            raise UserError(f"schedule '{one_line(schedule)}': another pipeline has one of this name; give another")
        if before and not replace:
            raise UserError(
                f"schedule '{one_line(schedule)}': there is one of this name already; give another, or --replace to put this in its place"
            )
        with packaged(wanted) as package:
            place = find_places(cluster, wanted, package)
        made = create_schedule(cluster, start_of(wanted, place, schedule), there)
        # The new one first: a failure in between leaves one too many, which can be seen and deleted, and never none.
        for row in before:
            with answering(cluster.host, f"the schedule that '{one_line(schedule)}' replaces ({row.recurring_run_id})"):
                cluster.client.delete_recurring_run(row.recurring_run_id)
    warn_of_tag(image)
    say(f"Schedule: {schedule} ({made.recurring_run_id}){', in place of the one before' if before else ''}")
    say(
        f"When: {crons.in_words(expression)}, {zone.key}"
        + (f"; KFP has it as '{there}', {kfp.key}" if there != expression else "")
    )
    say(
        "Next: "
        + ", ".join(shown_time(time) for time in (one.astimezone(zone) for one in crons.next_times(there, kfp)))
    )
    say("One run at a time; times that are missed are not made up for")


@schedule_app.command("list")
def list_(
    cluster_timezone: ClusterZone = "UTC",
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """List the schedules, and when each runs next."""
    kfp = crons.find_zone(cluster_timezone)
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        ours = our_pipeline(cluster)
        rows = [row for row in all_schedules(cluster) if is_of(row, ours)]
    if not rows:
        say(f"No schedules of {PIPELINE} at {cluster.host}; 'graftwork schedule create' makes one")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("schedule", "state", "when", "next", "data"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        words, following = told(row, kfp)
        data = ((row.runtime_config and row.runtime_config.parameters) or {}).get("data", "")
        state = "paused" if row.status == "DISABLED" else "on"
        table.add_row(
            escape(one_line(row.display_name)),
            state,
            words,
            "" if state == "paused" else following,
            escape(one_line(data)),
        )
    console.print(table)


@schedule_app.command()
def pause(
    schedule: Name,
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Hold a schedule until it is resumed; a run that has begun goes on."""
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        on_each(cluster, schedule, cluster.client.disable_recurring_run)
    say(f"Schedule {schedule} is paused; graftwork schedule resume {schedule} lets it go on")


@schedule_app.command()
def resume(
    schedule: Name,
    cluster_timezone: ClusterZone = "UTC",
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Let a schedule go on."""
    kfp = crons.find_zone(cluster_timezone)
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        rows = on_each(cluster, schedule, cluster.client.enable_recurring_run)
    say(f"Schedule {schedule} is on; next: {told(rows[0], kfp)[1]}")


@schedule_app.command()
def delete(
    schedule: Name,
    host: Host = "",
    token_file: TokenFile = None,
    service_account: ServiceAccount = False,
    namespace: Namespace = "",
    ca_file: CertificateFile = None,
) -> None:
    """Delete a schedule; its runs stay."""
    with cluster_at(host, token_file, service_account, namespace, ca_file) as cluster:
        on_each(cluster, schedule, cluster.client.delete_recurring_run)
    say(f"Schedule {schedule} is deleted; the runs that it made stay")


# ---- on the server -------------------------------------------------------------------------------------------------------------


def create_schedule(cluster: Cluster, start: dict[str, Any], cron: str) -> Any:
    from kfp_server_api import RecurringRunMode, V2beta1CronSchedule, V2beta1RecurringRun, V2beta1Trigger

    # Not by the SDK's create_recurring_run, which knows no plugins_input.
    body = V2beta1RecurringRun(
        **start,
        trigger=V2beta1Trigger(cron_schedule=V2beta1CronSchedule(cron=cron)),
        mode=RecurringRunMode.ENABLE,
        max_concurrency="1",
        no_catchup=True,
    )
    make = cluster.client.recurring_runs.recurring_run_service_create_recurring_run
    return make_once(cluster, make, body, f"schedule '{one_line(start['display_name'])}'", "graftwork schedule list")


def all_schedules(cluster: Cluster) -> list[Any]:
    # The SDK leaves the namespace out where it is None, and a server for several users wants it.
    return list(pages(cluster.client.list_recurring_runs, "recurring_runs", namespace=cluster.namespace))


def on_each(cluster: Cluster, name: str, do: Any) -> list[Any]:
    """Do something with every schedule of this name, of which KFP lets there be several; those of other pipelines are not ours to touch."""
    import difflib

    ours = our_pipeline(cluster)
    everything = [row for row in all_schedules(cluster) if is_of(row, ours)]
    rows = [row for row in everything if row.display_name == name]
    if not rows:
        near = difflib.get_close_matches(name, [row.display_name for row in everything], n=1)
        raise UserError(
            f"schedule '{one_line(name)}': there is none of this name at {cluster.host}; "
            + (f"did you mean {one_line(near[0])}?" if near else "'graftwork schedule list' lists them")
        )
    with answering(cluster.host, f"schedule '{one_line(name)}'"):
        for row in rows:
            do(row.recurring_run_id)
    return rows


# ---- shown ---------------------------------------------------------------------------------------------------------------------


def told(row: Any, zone: ZoneInfo) -> tuple[str, str]:
    """Return when a schedule runs, in words, and its next time; what another tool has made may be of another kind."""
    trigger = row.trigger
    cron = trigger.cron_schedule.cron if trigger and trigger.cron_schedule else ""
    if not cron:
        seconds = trigger.periodic_schedule.interval_second if trigger and trigger.periodic_schedule else "?"
        return f"every {seconds} s", ""
    try:
        expression = crons.parse(
            cron if len(cron.split()) != 5 else f"{cron} *"
        )  # of five, KFP takes the first for seconds
    except UserError:
        return cron, ""
    return f"{crons.in_words(expression)}, {zone.key}", shown_time(crons.next_times(expression, zone, 1)[0])


def shown_time(time: datetime) -> str:
    return f"{time:%a %Y-%m-%d %H:%M:%S %Z}".replace(":00 ", " ")
