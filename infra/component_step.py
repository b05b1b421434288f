"""Run one step of a compiled pipeline as KFP would, with artifacts in a folder: how a component is tried in a pod of its own.

    component_step.py PIPELINE.yaml                                   the steps, in an order in which they can run
    component_step.py PIPELINE.yaml FOLDER STEP [NAME=VALUE...]       run one; what earlier ones left is in FOLDER

The step's own command is run, with the input that KFP's driver would write for it. Needs no more than Python and PyYAML, for it goes into the
pod with the pipeline (infra/test-cluster.sh). A condition or a loop in the pipeline is refused: only KFP itself decides those.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Spec = dict[str, Any]


class Step(NamedTuple):
    """A task that runs a container. A value is a constant, or names the step and the output where it comes from."""

    name: str
    executor: str
    component: Spec
    parameters: dict[str, Any]
    artifacts: dict[str, "Output"]
    after: set[str]


class Output(NamedTuple):
    step: str
    key: str


def main(arguments: list[str]) -> int:
    spec = next(yaml.safe_load_all(Path(arguments[0]).read_text(encoding="utf-8")))
    values = dict(assignment.partition("=")[::2] for assignment in arguments[3:])
    steps = in_order(flatten(spec, {name: parsed(text) for name, text in values.items()}))
    if len(arguments) < 3:
        print("\n".join(step.name for step in steps))
        return 0
    step = next((step for step in steps if step.name == arguments[2]), None)
    if step is None:
        print(f"step {arguments[2]}: is not among {', '.join(s.name for s in steps)}", file=sys.stderr)
        return 2
    return run(spec, step, Path(arguments[1]))


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---- the graph -----------------------------------------------------------------------------------------------------------------


def flatten(spec: Spec, given: dict[str, Any]) -> list[Step]:
    """Return the steps of the pipeline, those inside nested pipelines (an exit handler is one) included."""
    defined = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    unknown = set(given) - set(defined)
    if unknown:
        raise SystemExit(f"component_step: the pipeline has no parameter {', '.join(sorted(unknown))}")
    inputs = {name: given.get(name, one.get("defaultValue")) for name, one in defined.items()}
    steps: list[Step] = []
    dag_steps(spec, spec["root"]["dag"], inputs, {}, set(), steps)
    return steps


def dag_steps(
    spec: Spec, dag: Spec, inputs: dict[str, Any], artifacts: dict[str, Output], after: set[str], steps: list[Step]
) -> dict[str, dict[str, Any]]:
    """Append a DAG's steps, and return what each of its tasks gives: the constants and outputs by key."""
    given: dict[str, dict[str, Any]] = {}
    ends: dict[str, set[str]] = {}
    for name in topological(dag["tasks"]):
        task = dag["tasks"][name]
        for what in ("parameterIterator", "artifactIterator"):
            if what in task:
                raise SystemExit(f"component_step: task {name} is a loop, which only KFP runs")
        if task.get("triggerPolicy", {}).get("condition"):
            raise SystemExit(f"component_step: task {name} has a condition, which only KFP decides")
        component = spec["components"][task["componentRef"]["name"]]
        values = parameters_of(task, component, inputs, given)
        files = artifacts_of(task, artifacts, given)
        before = after.union(*(ends[other] for other in task.get("dependentTasks", [])))
        if "dag" in component:
            first = len(steps)
            inside = dag_steps(spec, component["dag"], values, files, before, steps)
            given[name] = outputs_of(component["dag"], inside)
            ends[name] = {step.name for step in steps[first:]}
        else:
            steps.append(Step(name, component["executorLabel"], component, values, files, before))
            keys = component.get("outputDefinitions", {})
            given[name] = {key: Output(name, key) for kind in ("parameters", "artifacts") for key in keys.get(kind, {})}
            ends[name] = {name}
    return given


def topological(tasks: Spec) -> list[str]:
    done: list[str] = []
    while len(done) < len(tasks):
        ready = [n for n in tasks if n not in done and set(tasks[n].get("dependentTasks", [])) <= set(done)]
        if not ready:
            raise SystemExit("component_step: the tasks wait for each other")
        done += sorted(ready)
    return done


def parameters_of(task: Spec, component: Spec, inputs: dict[str, Any], given: dict[str, dict[str, Any]]) -> Spec:
    defined = component.get("inputDefinitions", {}).get("parameters", {})
    values = {name: one["defaultValue"] for name, one in defined.items() if "defaultValue" in one}
    for name, source in task.get("inputs", {}).get("parameters", {}).items():
        if "componentInputParameter" in source:
            value = inputs[source["componentInputParameter"]]
        elif "taskOutputParameter" in source:
            output = source["taskOutputParameter"]
            value = given[output["producerTask"]][output["outputParameterKey"]]
        elif "taskFinalStatus" in source:
            value = {
                "state": "SUCCEEDED",
                "error": {},
                "pipelineJobResourceName": "component-step",
                "pipelineTaskName": source["taskFinalStatus"]["producerTask"],
            }
        else:
            value = source["runtimeValue"]["constant"]
        if value is not None:
            values[name] = value
    return values


def artifacts_of(task: Spec, artifacts: dict[str, Output], given: dict[str, dict[str, Any]]) -> dict[str, Output]:
    found = {}
    for name, source in task.get("inputs", {}).get("artifacts", {}).items():
        if "componentInputArtifact" in source:
            output = artifacts.get(source["componentInputArtifact"])
        else:
            wanted = source["taskOutputArtifact"]
            output = given[wanted["producerTask"]][wanted["outputArtifactKey"]]
        if output is not None:
            found[name] = output
    return found


def outputs_of(dag: Spec, inside: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what a nested pipeline gives: outputs of the tasks in it."""
    outputs = dag.get("outputs", {})
    found = {}
    for key, one in outputs.get("artifacts", {}).items():
        selector = one["artifactSelectors"][0]
        found[key] = inside[selector["producerSubtask"]][selector["outputArtifactKey"]]
    for key, one in outputs.get("parameters", {}).items():
        source = one["valueFromParameter"]
        found[key] = inside[source["producerSubtask"]][source["outputParameterKey"]]
    return found


def in_order(steps: list[Step]) -> list[Step]:
    """Sort steps so that each stands after those that it needs."""
    done: list[Step] = []
    names: set[str] = set()
    while len(done) < len(steps):
        ready = [s for s in steps if s.name not in names and (s.after | sources(s)) <= names]
        if not ready:
            raise SystemExit("component_step: the steps wait for each other")
        done += ready
        names |= {s.name for s in ready}
    return done


def sources(step: Step) -> set[str]:
    return {v.step for v in (*step.parameters.values(), *step.artifacts.values()) if isinstance(v, Output)}


# ---- one step ------------------------------------------------------------------------------------------------------------------


def run(spec: Spec, step: Step, folder: Path) -> int:
    container = spec["deploymentSpec"]["executors"][step.executor]["container"]
    own = folder / step.name
    own.mkdir(parents=True, exist_ok=True)
    text = json.dumps(executor_input(step, folder))
    command = [part.replace("{{$}}", text) for part in (*container.get("command", []), *container.get("args", []))]
    # What is set here goes before what the pipeline sets: its volume may lie elsewhere.
    environment = {one["name"]: one["value"] for one in container.get("env", [])} | os.environ
    return subprocess.run(command, env=environment).returncode


def executor_input(step: Step, folder: Path) -> Spec:
    own = folder / step.name
    outputs = step.component.get("outputDefinitions", {})
    values = {
        name: earlier(folder, value)["parameterValues"][value.key] if isinstance(value, Output) else value
        for name, value in step.parameters.items()
    }
    types = step.component.get("inputDefinitions", {}).get("artifacts", {})
    return {
        "inputs": {
            "parameterValues": values,
            "artifacts": {
                name: {"artifacts": [artifact_in(folder, output, types[name]["artifactType"])]}
                for name, output in step.artifacts.items()
            },
        },
        "outputs": {
            "parameters": {key: {"outputFile": str(own / f"{key}.txt")} for key in outputs.get("parameters", {})},
            "artifacts": {
                key: {"artifacts": [{"name": key, "type": one["artifactType"], "uri": str(own / key), "metadata": {}}]}
                for key, one in outputs.get("artifacts", {}).items()
            },
            "outputFile": str(own / "executor_output.json"),
        },
    }


def artifact_in(folder: Path, output: Output, kind: Spec) -> Spec:
    left = earlier(folder, output).get("artifacts", {}).get(output.key, {}).get("artifacts", [{}])[0]
    path = folder / output.step / output.key
    return {"name": output.key, "type": kind, "uri": str(path), "metadata": left.get("metadata", {})}


def earlier(folder: Path, output: Output) -> Spec:
    path = folder / output.step / "executor_output.json"
    if not path.is_file():
        raise SystemExit(f"component_step: step {output.step} has not run yet: there is no {path}")
    content: Spec = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
