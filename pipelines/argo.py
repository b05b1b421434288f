"""How far each step of a run on a cluster is, read from KFP's task details, which are the nodes of Argo's workflow.

A step is a DAG of its own with ``executor`` in it, or ``executor(0)``, ``executor(1)``, ... where it may be tried again. A node has the name that is
shown and the ids of its children, but not its own: an id is the workflow's name and a hash of the names on the way from the root (Argo's
``NodeID``), so that a node is known by the ids of those that must be below it.
"""

import itertools
from datetime import UTC, datetime
from typing import Any, NamedTuple

from graftwork.errors import one_line
from graftwork.pipelines.display import WORDS
from graftwork.tracking import shown_uri

FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


class Planned(NamedTuple):
    """A step of the pipeline: its name, and the DAGs that it stands in below the root."""

    name: str
    within: tuple[str, ...]


class Try(NamedTuple):
    """One pod of a step: the names that it may have, the likeliest first, and the number that they all end with."""

    pods: tuple[str, ...]
    number: str
    state: str


class Step(NamedTuple):
    """A step of a run; ``state`` is empty where it has not begun."""

    name: str
    label: str
    state: str
    tries: list[Try]
    cached: bool
    said: str  # the server's words on why it failed or hangs
    seconds: float | None


def steps_in(dag: dict[str, Any], components: dict[str, Any], within: tuple[str, ...] = ()) -> dict[str, Planned]:
    """Return the steps of a DAG, those of the DAGs within it among them."""
    found: dict[str, Planned] = {}
    waiting, done = dict(dag.get("tasks", {})), set()
    while waiting:
        ready = [k for k, task in waiting.items() if done.issuperset(task.get("dependentTasks", []))] or list(waiting)
        for key in sorted(ready, key=order):
            task = waiting.pop(key)
            done.add(key)
            inner = components.get(task["componentRef"]["name"], {}).get("dag")
            found |= (
                steps_in(inner, components, (*within, key))
                if inner
                else {key: Planned(task["taskInfo"]["name"], within)}
            )
    return found


def order(key: str) -> tuple[int, str]:
    """Return where a step stands among those that could begin at once."""
    words = list(WORDS)
    name = key.replace("-", "_")
    return (words.index(name) if name in words else len(words), key)


def steps_of(run: Any, planned: dict[str, Planned]) -> list[Step]:
    """Return the state of each step of a run; without a plan, of those that have begun."""
    nodes = (run.run_details.task_details if run.run_details else None) or []
    if not planned:  # no specification: the names tell enough
        names = [node.display_name for node in nodes]
        planned = {name: Planned(name, ()) for name in names if f"{name}-driver" in names and name != "root"}
    workflow = next((child.rpartition("-")[0] for node in nodes for child in children(node)), "")
    return [step_of(key, step, nodes, workflow) for key, step in planned.items()]


def step_of(key: str, planned: Planned, nodes: list[Any], workflow: str) -> Step:
    label = WORDS.get(planned.name.replace("-", "_"), planned.name.replace("-", " "))
    drivers = [node for node in nodes if base(node) == f"{key}-driver"]
    dags = sorted((node for node in nodes if base(node) == key), key=lambda node: node.display_name)
    if not dags:
        state = "" if not drivers else "FAILED" if drivers[0].state == "FAILED" else "PENDING"
        return Step(planned.name, label, state, [], False, words_of(drivers), None)
    dag, state = dags[-1], dags[0].state or ""
    name, seconds = name_of(dag, key, planned.within, workflow), elapsed(dag)
    again = retries(name, nodes, workflow) if name else []
    executors = [node for node in nodes if base(node) == "executor"]
    skipped = any(node.state == "SKIPPED" for node in executors)
    cached = state == "SUCCEEDED" and not again and skipped and (seconds or 0) <= 1
    tries = []
    if name and not cached and state not in ("SKIPPED", "PENDING", ""):
        tries = tries_of(again or [node_number(f"{name}.executor")], bool(again), state, nodes, workflow)
        state = tries[-1].state
    own = {one.number for one in tries}
    failed = [node for node in executors if node.state == "FAILED" and is_part(node, dag, own)]
    shown = seconds if state in (*FINISHED, "RUNNING") else None
    return Step(planned.name, label, state, tries, cached, words_of([*reversed(failed), *dags, *drivers]), shown)


def base(node: Any) -> str:
    return str(node.display_name).partition("(")[0]


def children(node: Any) -> set[str]:
    return {child.pod_name or child.task_id or "" for child in node.child_tasks or []}


def node_number(name: str) -> str:
    """Return the number at the end of the id of Argo's node ``name``: FNV-1a, of 32 bits."""
    number = 0x811C9DC5
    for byte in name.encode():
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return str(number)


def name_of(dag: Any, key: str, within: tuple[str, ...], workflow: str) -> str:
    """Return Argo's whole name of a step's DAG: the one below which ``executor`` has the id that is among its children.

    A cluster whose defaults try every template again puts the number of the try to each name on the way.
    """
    below, levels = children(dag), ("root", *within, key)
    for tries in itertools.product(("", "(0)", "(1)", "(2)"), repeat=len(levels)):
        name = ".".join((workflow, *(level + number for level, number in zip(levels, tries, strict=True))))
        if f"{workflow}-{node_number(f'{name}.executor')}" in below:
            return name
    return ""


def retries(name: str, nodes: list[Any], workflow: str) -> list[str]:
    """Return the numbers of ``executor(0)``, ``executor(1)``, ... below the step of this name; none where it is tried once."""
    for node in nodes:
        below = children(node) if node.display_name == "executor" else set()
        numbers = (node_number(f"{name}.executor({n})") for n in itertools.count())
        found = list(itertools.takewhile(lambda number: f"{workflow}-{number}" in below, numbers))  # noqa: B023
        if found:
            return found
    return []


def tries_of(numbers: list[str], retried: bool, state: str, nodes: list[Any], workflow: str) -> list[Try]:
    """Return the pods of a step: all but the last have failed, and the last is as the step is, unless it waits for a node.

    Argo counts a DAG as running while its pod still waits.
    """
    last = f"executor({len(numbers) - 1})" if retried else "executor"
    alive = {node.state for node in nodes if node.display_name == last} & {"RUNNING", "PENDING"}
    states = ["FAILED"] * (len(numbers) - 1) + ["PENDING" if state == "RUNNING" and alive == {"PENDING"} else state]
    pods = [pod_names(number, retried, nodes, workflow) for number in numbers]
    return [Try(*one) for one in zip(pods, numbers, states, strict=True)]


def pod_names(number: str, retried: bool, nodes: list[Any], workflow: str) -> tuple[str, ...]:
    """Return the names that a pod may have: as the server tells it, else by the templates of KFP's compiler."""
    told = [node.pod_name for node in nodes if node.pod_name and node.pod_name.endswith(f"-{number}")]
    templates = ("retry-system-container-impl", "system-container-impl")[:: 1 if retried else -1]
    return (*told, *(f"{workflow}-{template}-{number}" for template in templates))


def is_part(node: Any, dag: Any, numbers: set[str]) -> bool:
    """Whether a node that failed is of this step: by its pod's name where that is told, else by its time."""
    if node.pod_name:
        return node.pod_name.rpartition("-")[2] in numbers
    if not (node.start_time and dag.start_time):
        return False
    ended = dag.end_time if dag.end_time and dag.end_time.year > 1970 else None
    return node.start_time >= dag.start_time and (ended is None or node.start_time <= ended)


def elapsed(node: Any) -> float | None:
    if not node.start_time:
        return None
    ended = node.end_time if node.end_time and node.end_time.year > 1970 else datetime.now(UTC)
    return float((ended - node.start_time).total_seconds())


def words_of(nodes: list[Any]) -> str:
    """Return the first message of an error among ``nodes``, as the server tells it."""
    for node in nodes:
        told = [node.error] if node is not None and node.error else []
        told += [past.error for past in reversed((node and node.state_history) or []) if past.error]
        for error in told:
            if error.message:
                return one_line(shown_uri(error.message.strip()), 300)
    return ""
