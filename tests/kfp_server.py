"""A Kubeflow Pipelines server for tests: the part of its REST API v2beta1 that Graftwork uses, on loopback, with its state in memory.

What comes in is held against the SDK's own models (``kfp_server_api``), so that a field that KFP does not know is refused, as KFP does. It asks
for a token where it has one, keeps a log of the requests, and fails where it is told to. ``python tests/kfp_server.py 8080`` serves it to a shell.
"""

import contextlib
import email.parser
import email.policy
import itertools
import json
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api
import yaml

Json = dict[str, Any]
LIMIT = 10_000  # bytes of a parameter
WORKFLOW = "graftwork-image-classification-x7k2p"
LISTS = ("page_token", "page_size", "sort_by", "filter")


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Logged(NamedTuple):
    """One request: what was asked, and what was answered."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    status: int

    def line(self) -> str:
        asked = "&".join(f"{key}={value}" for key, value in self.query.items() if value)
        return f"{self.method} {self.path}{'?' + asked if asked else ''} -> {self.status}"


class Server:
    """``fail`` and ``slow`` say how it goes wrong; ``log`` what was asked; ``steps`` how far a run is."""

    def __init__(self, port: int = 0, token: str = "", multi_user: bool = False) -> None:
        self.token, self.multi_user = token, multi_user
        self.version = "v2beta1"  # v1beta1: a server from before KFP 2; page: a login page for every request
        self.plugins = True  # False: a server before 2.17, which knows none
        self.log: list[Logged] = []
        self.pipelines: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.schedules: dict[str, Json] = {}
        self.pod_logs: dict[str, str] = {}
        self.failures: list[tuple[str, str, int, int, str]] = []
        self.delay = 0.0
        self._lock = threading.RLock()
        self._clock = itertools.count()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler_of(self))
        self._http.daemon_threads = True
        self.host = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def fail(
        self, status: int, path: str = "", method: str = "", times: int = 1000, message: str = "told to fail"
    ) -> None:
        """Answer with ``status`` to the next requests whose method and path hold these; ``status`` 0 hangs up."""
        self.failures.append((method, path, status, times, message))

    def heal(self) -> None:
        self.failures.clear()
        self.delay, self.version = 0.0, "v2beta1"

    def changes(self) -> list[str]:
        """Return the requests that were to change something, as lines."""
        return [entry.line() for entry in self.log if entry.method != "GET"]

    # ---- the state of runs ---------------------------------------------------------------------------------------------------

    def steps(
        self,
        run_id: str,
        steps: dict[str, list[str]],
        state: str = "RUNNING",
        cached: tuple[str, ...] = (),
        defaults: str = "",
    ) -> None:
        """Put a run into a state: the states of each step's tries, in order, as Argo's nodes appear in KFP's task details.

        As on a cluster, a step is a DAG with a driver before it and ``executor`` in it, whose tries are ``executor(0)``, ``executor(1)``; the next
        step's driver is a child of what ends the one before; a node tells the ids of its children, which are hashes of names, and not its own; the
        order is none. ``defaults`` "(0)" is a cluster that tries every template again.
        """
        with self._lock:
            run = self.runs[run_id]
            spec = self.versions[run["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"][
                "pipeline_spec"
            ]
            places = places_of(spec["root"]["dag"], spec["components"], f"{WORKFLOW}.root{defaults}", defaults)
            tasks: list[Json] = []

            def node(path: str, state: str, below: list[str], seconds: float = 60.0) -> str:
                ended = {} if state in ("RUNNING", "PENDING") else {"end_time": now(-600 + seconds)}
                children = {"child_tasks": [{"pod_name": node_id(child)} for child in below]} if below else {}
                name = path.rpartition(".")[2] if path != WORKFLOW else path
                row = {"run_id": run_id, "task_id": str(uuid.uuid4()), "display_name": name, "create_time": now(-600)}
                tasks.append({**row, "start_time": now(-600), "state": state, **ended, **children})
                return path

            following: list[str] = []
            for step, tries in reversed(steps.items()):
                place = places[step]
                executor, last, retried = f"{place}.executor", tries[-1], step not in cached
                after = following if last in ("SUCCEEDED", "SKIPPED") else []
                if retried:
                    pods = [
                        node(f"{executor}({n})", tried, after if n + 1 == len(tries) else [], 60 * n + 60)
                        for n, tried in enumerate(tries)
                    ]
                    # Argo counts what holds a pod as running while the pod waits for its node.
                    last = "RUNNING" if last == "PENDING" else last
                    node(executor, last, pods, 60 * len(tries))
                else:
                    node(executor, "SKIPPED", after, 0)
                node(place, last, [executor], 60 * len(tries) if retried else 0)
                following = [node(f"{place}-driver" if not defaults else f"{place[:-3]}-driver", "SUCCEEDED", [place])]
            root = node(f"{WORKFLOW}.root{defaults}", state, following)
            node(WORKFLOW, state, [node(f"{WORKFLOW}.root-driver", "SUCCEEDED", [root])])
            tasks.sort(key=lambda task: task["task_id"])
            run["run_details"] = {"task_details": tasks}
            run["state"] = state
            run.setdefault("state_history", []).append({"update_time": now(), "state": state})
            if state in ("SUCCEEDED", "FAILED", "CANCELED"):
                run["finished_at"] = now()

    def pod(self, run_id: str, step: str, number: int = 0) -> str:
        """Return the name of the pod of a step's try."""
        run = self.runs[run_id]
        spec = self.versions[run["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"]["pipeline_spec"]
        place = places_of(spec["root"]["dag"], spec["components"], f"{WORKFLOW}.root", "")[step]
        identity = node_id(f"{place}.executor({number})")
        return f"{WORKFLOW}-retry-system-container-impl-{identity.rpartition('-')[2]}"

    def tasks(self, run_id: str, name: str) -> list[Json]:
        """Return the task details of this name."""
        return [task for task in self.runs[run_id]["run_details"]["task_details"] if task["display_name"] == name]

    # ---- answering -----------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, str], body: Any, authorization: str) -> tuple[int, Any]:
        try:
            if self.delay:
                time.sleep(self.delay)
            self._fail_as_told(method, path)
            if self.version == "page":
                return 200, "<html><body>Log in</body></html>"
            if self.token and authorization != f"Bearer {self.token}":
                raise RefusedError(401, "Request header error: there is no user identity header")
            if self.version == "v1beta1":
                if (method, path) == ("GET", "/apis/v1beta1/healthz"):
                    return 200, {"commit_sha": "x", "tag_name": "1.8.5", "multi_user": False}
                raise RefusedError(404, "Not Found")
            for pattern, asked, wanted, do in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and asked == method:
                    unknown = set(query) - set(wanted)
                    if unknown:
                        raise RefusedError(400, f"unknown query parameters {sorted(unknown)}")
                    with self._lock:
                        return 200, do(self, query, body, *map(unquote, found.groups()))
            raise RefusedError(404, "Not Found")
        except RefusedError as refused:
            details = [{"@type": "type.googleapis.com/google.rpc.Status", "code": 3, "message": refused.message}]
            return refused.status, {"error": refused.message, "code": 3, "message": refused.message, "details": details}

    def _fail_as_told(self, method: str, path: str) -> None:
        for n, (of_method, of_path, status, times, message) in enumerate(self.failures):
            if of_method in ("", method) and of_path in path and times:
                self.failures[n] = (of_method, of_path, status, times - 1, message)
                raise ConnectionAbortedError if status == 0 else RefusedError(status, message)

    def created(self) -> str:
        """Return a time later than those before, in the order of the calls."""
        return (datetime(2026, 11, 26, tzinfo=UTC) + timedelta(seconds=next(self._clock))).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )


def node_id(path: str) -> str:
    """Return the id of Argo's node of this name."""
    number = 2166136261
    for byte in path.encode():
        number = ((number ^ byte) * 16777619) % 2**32
    return f"{WORKFLOW}-{number}"


def places_of(dag: Json, components: Json, root: str, defaults: str) -> dict[str, str]:
    """Return Argo's whole name of the DAG of each step."""
    found: dict[str, str] = {}
    for key, task in dag["tasks"].items():
        inner = components[task["componentRef"]["name"]].get("dag")
        place = f"{root}.{key}{defaults}"
        found |= places_of(inner, components, place, defaults) if inner else {key: place}
    return found


# ---- what it does --------------------------------------------------------------------------------------------------------------


def healthz(server: Server, query: dict[str, str], body: Any) -> Json:
    return {"multi_user": server.multi_user, "pipeline_store": "database"}


def create_pipeline(server: Server, query: dict[str, str], body: Any) -> Json:
    check(body, "V2beta1Pipeline")
    name = body.get("display_name") or body.get("name")
    if not name:
        raise RefusedError(400, "pipeline's name cannot be empty")
    if any(row["display_name"] == name for row in server.pipelines.values()):
        raise RefusedError(409, f"Already exist error: The name {name} already exist. Please specify a new name")
    return keep(server, server.pipelines, "pipeline_id", {**body, "display_name": name, "name": name})


def get_pipeline(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    return found(server.pipelines, key, "Pipeline")


def list_pipelines(server: Server, query: dict[str, str], body: Any) -> Json:
    return listing(server.pipelines.values(), "pipelines", query)


def upload_version(server: Server, query: dict[str, str], body: Any) -> Json:
    pipeline = found(server.pipelines, query.get("pipelineid", ""), "Pipeline")
    name = query.get("name", "")
    if not name:
        raise RefusedError(400, "pipeline version's name cannot be empty")
    if any((v["pipeline_id"], v["display_name"]) == (pipeline["pipeline_id"], name) for v in server.versions.values()):
        raise RefusedError(409, f"Already exist error: The name {name} already exist. Please specify a new name")
    if not isinstance(body, bytes):
        raise RefusedError(400, "Failed to read pipeline from file: no file 'uploadfile'")
    documents = list(yaml.load_all(body, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    if not documents or "deploymentSpec" not in documents[0] or "root" not in documents[0]:
        raise RefusedError(400, "invalid v2 pipeline spec")
    spec = {"pipeline_spec": documents[0]} | ({"platform_spec": documents[1]} if len(documents) > 1 else {})
    version = {"pipeline_id": pipeline["pipeline_id"], "display_name": name, "name": name, "pipeline_spec": spec}
    version["description"] = query.get("description", "")
    return keep(server, server.versions, "pipeline_version_id", version)


def list_versions(server: Server, query: dict[str, str], body: Any, pipeline: str) -> Json:
    found(server.pipelines, pipeline, "Pipeline")
    return listing((v for v in server.versions.values() if v["pipeline_id"] == pipeline), "pipeline_versions", query)


def get_version(server: Server, query: dict[str, str], body: Any, pipeline: str, version: str) -> Json:
    return found(server.versions, version, "PipelineVersion")


def create_experiment(server: Server, query: dict[str, str], body: Any) -> Json:
    check(body, "V2beta1Experiment")
    if server.multi_user and not body.get("namespace"):
        raise RefusedError(400, "Invalid input error: Experiment must have a namespace in multi-user mode")
    if any(row["display_name"] == body["display_name"] for row in server.experiments.values()):
        raise RefusedError(409, f"Already exist error: Experiment {body['display_name']} already exists")
    return keep(server, server.experiments, "experiment_id", {"storage_state": "AVAILABLE", **body})


def list_experiments(server: Server, query: dict[str, str], body: Any) -> Json:
    return listing(server.experiments.values(), "experiments", query)


def get_experiment(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    return found(server.experiments, key, "Experiment")


def create_run(server: Server, query: dict[str, str], body: Any) -> Json:
    check(body, "V2beta1Run")
    check_start(server, body)
    made = {**body, "state": "PENDING", "state_history": [{"update_time": now(), "state": "PENDING"}]}
    return keep(server, server.runs, "run_id", made)


def list_runs(server: Server, query: dict[str, str], body: Any) -> Json:
    rows = [r for r in server.runs.values() if query.get("experiment_id") in (None, "", r["experiment_id"])]
    return listing(rows, "runs", query)


def get_run(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    return found(server.runs, key, "Run")


def terminate_run(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    run = found(server.runs, key, "Run")
    if run["state"] in ("SUCCEEDED", "FAILED", "CANCELED"):
        raise RefusedError(400, f"Failed to terminate run {key}: it has finished")
    run["state"] = "CANCELING"
    return {}


def create_schedule(server: Server, query: dict[str, str], body: Any) -> Json:
    check(body, "V2beta1RecurringRun")
    check_start(server, body)
    if not 1 <= int(body.get("max_concurrency", "0")) <= 10:
        raise RefusedError(400, "The max_concurrency of a recurring run must be at least 1 and at most 10")
    trigger = body.get("trigger", {})
    if ("cron_schedule" in trigger) == ("periodic_schedule" in trigger):
        raise RefusedError(400, "a recurring run needs exactly one of cron_schedule and periodic_schedule")
    cron = trigger.get("cron_schedule", {}).get("cron", "")
    if len(cron.split()) != 6:  # KFP takes five as well, and reads them as seconds to months
        raise RefusedError(400, f"Schedule cron is not a supported format: expected 6 fields, found {cron!r}")
    status = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[body.get("mode", "")]
    return keep(server, server.schedules, "recurring_run_id", {**body, "status": status})


def list_schedules(server: Server, query: dict[str, str], body: Any) -> Json:
    return listing(server.schedules.values(), "recurringRuns", query)


def get_schedule(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    return found(server.schedules, key, "RecurringRun")


def enable_schedule(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    found(server.schedules, key, "RecurringRun")["status"] = "ENABLED"
    return {}


def disable_schedule(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    found(server.schedules, key, "RecurringRun")["status"] = "DISABLED"
    return {}


def delete_schedule(server: Server, query: dict[str, str], body: Any, key: str) -> Json:
    del server.schedules[found(server.schedules, key, "RecurringRun")["recurring_run_id"]]
    return {}


def read_log(server: Server, query: dict[str, str], body: Any, run: str, pod: str) -> Any:
    """Answer as KFP does: status 200 in any case, and an error as JSON in the text."""
    found(server.runs, run, "Run")
    if pod not in server.pod_logs:
        return json.dumps(
            {
                "error_message": f"Failed to read logs from pod {pod} due to error opening log stream",
                "error_details": "trace",
            }
        )
    return server.pod_logs[pod]


BASE = "/apis/v2beta1"
ID = "([^/:]+)"
NAMESPACED = (*LISTS, "namespace")
OWNED = (*NAMESPACED, "experiment_id")
ROUTES = (
    (f"{BASE}/healthz", "GET", (), healthz),
    (f"{BASE}/pipelines", "POST", (), create_pipeline),
    (f"{BASE}/pipelines", "GET", NAMESPACED, list_pipelines),
    (
        f"{BASE}/pipelines/upload_version",
        "POST",
        ("name", "display_name", "pipelineid", "description", "tags"),
        upload_version,
    ),
    (f"{BASE}/pipelines/{ID}", "GET", (), get_pipeline),
    (f"{BASE}/pipelines/{ID}/versions", "GET", LISTS, list_versions),
    (f"{BASE}/pipelines/{ID}/versions/{ID}", "GET", (), get_version),
    (f"{BASE}/experiments", "POST", (), create_experiment),
    (f"{BASE}/experiments", "GET", NAMESPACED, list_experiments),
    (f"{BASE}/experiments/{ID}", "GET", (), get_experiment),
    (f"{BASE}/runs", "POST", ("experiment_id",), create_run),
    (f"{BASE}/runs", "GET", OWNED, list_runs),
    (f"{BASE}/runs/{ID}", "GET", ("experiment_id",), get_run),
    (f"{BASE}/runs/{ID}:terminate", "POST", ("experiment_id",), terminate_run),
    (f"{BASE}/recurringruns", "POST", (), create_schedule),
    (f"{BASE}/recurringruns", "GET", OWNED, list_schedules),
    (f"{BASE}/recurringruns/{ID}", "GET", (), get_schedule),
    (f"{BASE}/recurringruns/{ID}", "DELETE", (), delete_schedule),
    (f"{BASE}/recurringruns/{ID}:enable", "POST", (), enable_schedule),
    (f"{BASE}/recurringruns/{ID}:disable", "POST", (), disable_schedule),
    (f"/apis/v1alpha1/runs/{ID}/nodes/{ID}/log", "GET", ("follow",), read_log),
)


def check_start(server: Server, body: Json) -> None:
    """Refuse a run or a schedule that KFP could not start: its experiment, its version, its parameters."""
    found(server.experiments, body.get("experiment_id", ""), "Experiment")
    reference = body.get("pipeline_version_reference", {})
    version = found(server.versions, reference.get("pipeline_version_id", ""), "PipelineVersion")
    if version["pipeline_id"] != reference.get("pipeline_id"):
        raise RefusedError(400, "pipeline ID should be parent of pipeline version")
    declared = version["pipeline_spec"]["pipeline_spec"]["root"].get("inputDefinitions", {}).get("parameters", {})
    given = body.get("runtime_config", {}).get("parameters", {})
    for name, value in given.items():
        if name not in declared:
            raise RefusedError(400, f"parameter {name} is not an input of the pipeline")
        if not fits(value, declared[name]["parameterType"]):
            raise RefusedError(400, f"parameter {name} is no {declared[name]['parameterType']}: {value!r}")
        if len(json.dumps(value).encode()) > LIMIT:
            raise RefusedError(400, f"The input parameter length exceed maximum size of {LIMIT}")
    missing = [
        name
        for name, one in declared.items()
        if name not in given and "defaultValue" not in one and not one.get("isOptional")
    ]
    if missing:
        raise RefusedError(400, f"parameters {missing} have no value")
    plugins = body.get("plugins_input", {})
    if plugins and not server.plugins:
        raise RefusedError(400, 'proto: (line 1:2): unknown field "plugins_input"')
    if set(plugins) - {"mlflow"} or set(plugins.get("mlflow", {})) - {"experiment_name", "experiment_id", "disabled"}:
        raise RefusedError(400, "plugins_input.mlflow must follow schema {experiment_name, experiment_id, disabled}")


def fits(value: Any, kind: str) -> bool:
    return value is None or {
        "STRING": isinstance(value, str),
        "NUMBER_INTEGER": isinstance(value, int) and not isinstance(value, bool),
        "NUMBER_DOUBLE": isinstance(value, int | float) and not isinstance(value, bool),
        "BOOLEAN": isinstance(value, bool),
        "LIST": isinstance(value, list),
        "STRUCT": isinstance(value, dict),
    }.get(kind, False)


def found(rows: dict[str, Json], key: str, kind: str) -> Json:
    if key not in rows:
        raise RefusedError(404, f"{kind} {key} not found")
    return rows[key]


def keep(server: Server, rows: dict[str, Json], key: str, row: Json) -> Json:
    identity = str(uuid.uuid4())
    rows[identity] = {**row, key: identity, "created_at": server.created()}
    return rows[identity]


def listing(rows: Any, name: str, query: dict[str, str]) -> Json:
    rows = list(rows)
    if query.get("filter"):
        for predicate in json.loads(query["filter"])["predicates"]:
            if set(predicate) != {"operation", "key", "stringValue"} or predicate["operation"] not in ("EQUALS", 1):
                raise RefusedError(400, f"Invalid filter: {predicate}")
            rows = [row for row in rows if row.get(predicate["key"]) == predicate["stringValue"]]
    field, _, order = query.get("sort_by", "").partition(" ")
    if field not in ("", "created_at", "display_name") or order not in ("", "asc", "desc"):
        raise RefusedError(400, f"Invalid sorting: {query['sort_by']}")
    rows.sort(key=lambda row: row[field or "created_at"], reverse=order == "desc")
    start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 20)
    answer: Json = {name: rows[start : start + size], "total_size": len(rows)}
    return answer | ({"next_page_token": str(start + size)} if start + size < len(rows) else {})


def check(body: Any, model: str, where: str = "") -> None:
    """Hold a request's body against a model of the SDK; refuse as protobuf does."""
    kind = getattr(kfp_server_api, model)
    if not isinstance(body, dict):
        raise RefusedError(400, f"proto: {where or model}: expected an object, got {body!r}")
    types = {kind.attribute_map[attribute]: wanted for attribute, wanted in kind.openapi_types.items()}
    for name, value in body.items():
        if name not in types:
            raise RefusedError(400, f'proto: unknown field "{where}{name}"')
        check_value(value, types[name], f"{where}{name}.")


def check_value(value: Any, kind: str, where: str) -> None:
    plain = {"str": str, "int": int, "bool": bool, "float": (int, float)}
    if kind == "object":
        return
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            raise RefusedError(400, f"proto: {where} expected a list, got {value!r}")
        for one in value:
            check_value(one, inner[1], where)
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            raise RefusedError(400, f"proto: {where} expected an object, got {value!r}")
        for name, one in value.items():
            check_value(one, inner[1], f"{where}{name}.")
    elif kind in plain:
        if not isinstance(value, plain[kind]) or (kind == "int" and isinstance(value, bool)):
            raise RefusedError(400, f"proto: {where} expected {kind}, got {value!r}")
    elif kind == "datetime":
        datetime.fromisoformat(value)
    elif hasattr(getattr(kfp_server_api, kind), "allowable_values"):
        if value not in getattr(kfp_server_api, kind).allowable_values:
            raise RefusedError(400, f"proto: invalid value for enum {where} {value!r}")
    else:
        check(value, kind, where)


# ---- HTTP ----------------------------------------------------------------------------------------------------------------------


def handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond()

        def do_POST(self) -> None:
            self.respond()

        def do_DELETE(self) -> None:
            self.respond()

        def respond(self) -> None:
            address = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(address.query).items()}
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                body = self.parsed(content)
                status, answer = server.answer(
                    self.command, address.path, query, body, self.headers.get("Authorization", "")
                )
            except ConnectionAbortedError:
                server.log.append(Logged(self.command, address.path, query, None, 0))
                self.close_connection = True
                return
            shown = f"<{len(body)} bytes>" if isinstance(body, bytes) else body
            server.log.append(Logged(self.command, address.path, query, shown, status))
            kind = (
                "text/html"
                if str(answer).startswith("<html")
                else "text/plain"
                if isinstance(answer, str)
                else "application/json"
            )
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            with contextlib.suppress(OSError):  # whoever asked did not wait
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def parsed(self, content: bytes) -> Any:
            """Return the body: of a form the file in it, else JSON."""
            kind = self.headers.get("Content-Type", "")
            if not kind.startswith("multipart/form-data"):
                return json.loads(content) if content else None
            form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
                b"Content-Type: " + kind.encode() + b"\r\n\r\n" + content
            )
            for part in form.iter_parts():
                if part.get_param("name", header="content-disposition") == "uploadfile":
                    return part.get_payload(decode=True)
            return None

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def now(later: float = 0.0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=later)).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def serve(port: int = 0, token: str = "", multi_user: bool = False) -> Iterator[Server]:
    """Run a server; port 0 takes a free one."""
    server = Server(port, token, multi_user)
    try:
        yield server
    finally:
        server.close()


def main() -> None:
    with serve(int(sys.argv[1]) if len(sys.argv) > 1 else 8080, sys.argv[2] if len(sys.argv) > 2 else "") as server:
        print(server.host, flush=True)
        shown = 0
        while True:
            for entry in server.log[shown:]:
                print(entry.line(), flush=True)
                shown += 1
            time.sleep(0.1)


if __name__ == "__main__":
    main()
