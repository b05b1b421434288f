"""The service: a model over HTTP, with the scoring protocol of MLflow's own server.

``POST /invocations`` takes examples in MLflow's four JSON forms or in CSV, or one example as the body itself. An image is base64 text, or nested
arrays (height, width, 3) of 0..255 in JSON, or image/*; a text is a string, or text/plain (``graftwork.modality.Inputs``). It answers what the
registered pyfunc gives (``graftwork/predictor.py``): the label and a calibrated probability a class. ``GET /ping``, ``/health`` and ``/version``
are there as well. A client names no file: text is an example, or refused.

One event loop reads, a few threads decode, one thread runs the network over whatever waits, so that many clients share a batch and a lone
one waits for nobody. Everything that a client can send is bounded: bytes, examples, pixels or characters, requests, and the seconds until it has arrived.
"""

import asyncio
import codecs
import contextlib
import csv
import io
import json
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import h11
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from graftwork import __version__
from graftwork.calibration import probabilities
from graftwork.errors import UserError, one_line
from graftwork.modality import Array, BrokenExampleError, Inputs, name_of
from graftwork.modality import inputs as inputs_of
from graftwork.model import Floats, Model, load_model
from graftwork.parallel import cores
from graftwork.sources.record import NOUNS

log = logging.getLogger("graftwork.serving")
FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")  # MLflow's names
PIECE = 8  # examples of a request that are decoded together, and wait for the network together
HELD_ARRAYS = 128 * 2**20  # bytes of decoded examples that wait for the network or pass through it
GRAPHS = (1, 4, 16)  # examples at once that a fused graph is made for
GRAPH_BYTES = 2**30  # of weights that the graphs may hold: each has its own
SAME = 5e-6  # of a probability: a graph must give what the plain network gives
INLINE_BYTES = (
    2**16
)  # a request up to this is parsed at once; a larger one in a thread, one at a time, since parsing takes memory
GRACE = 20.0  # seconds for what is in flight when the service is stopped; a pod has 30
LARGE_BYTES = (
    2**20
)  # of requests larger than this, only so many are taken in and worked on at once: each may be held several times over
LARGE_REQUESTS = 4
HELD_BYTES = 128 * 2**20  # of all smaller requests together
VALUES = 2_000_000  # of JSON in a request: a parser makes an object of each, and stops everything meanwhile; three are a pixel
DRAIN = 5.0  # seconds in which a request that is too large is read and thrown away, so that its sender sees the answer
Item = Any  # what ``Inputs.from_body`` and ``Inputs.check`` give


class Limits(NamedTuple):
    """What a client may ask for."""

    request_bytes: int = 32 * 2**20
    examples: int = 256  # a request
    requests: int = 64  # that are worked on at once
    seconds: float = 30.0  # until a request has arrived

    @property
    def uploads(self) -> int:
        """Most requests that may be arriving: those that dawdle take no place from those that are worked on."""
        return 8 * self.requests


DEFAULT_LIMITS = Limits()


class RefusedError(Exception):
    """A request that is not answered with predictions; the text is one line."""

    def __init__(self, status: int, message: str, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.close = status, close


# ---- the process ---------------------------------------------------------------------------------------------------------------


def serve(
    folder: Path, host: str, port: int, limits: Limits = DEFAULT_LIMITS, announce: Callable[[str], None] = print
) -> None:
    """Serve the Model artifact in ``folder`` until SIGTERM or SIGINT; then finish what is in flight and return.

    ``announce`` gets the address (http://HOST:PORT) once requests are accepted. ``port`` 0 takes a free one.

    Raises:
        UserError: there is no model in ``folder``, or the address cannot be bound.
    """
    with bind(host, port) as listener:  # first: a port that is taken need not wait for a network
        worker = Worker(load_model(folder))
        app = application(worker, limits)
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            headers=[("server", f"graftwork/{__version__}")],
            timeout_keep_alive=max(1, round(limits.seconds)),
            timeout_graceful_shutdown=round(GRACE),
            backlog=1024,
        )
        try:
            Server(config, lambda: announce(address(listener))).run([listener])
        finally:
            worker.close()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, not listening yet.

    Raises:
        UserError: it cannot be bound.
    """
    try:
        family, kind, protocol, _, name = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"host {one_line(host)}: is no address of this machine ({one_line(error, 120)})") from None
    try:
        if hasattr(signal, "SIGKILL"):  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(name)  # listens when the network is ready: until then a client is refused, and does not wait
    except OSError as error:
        listener.close()
        reason = one_line(error.strerror or error, 120)
        raise UserError(f"port {port} of {one_line(host)}: cannot be had ({reason}); give another --port") from None
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which calls ``ready`` when it accepts, and ends by a signal as by a return: the exit status is 0."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another server was faster
            raise UserError(f"port: cannot be had ({one_line(error, 120)}); give another --port") from None
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a bound on the seconds for a request's head to arrive and for an answer to be taken."""

    head_timer: asyncio.TimerHandle | None = None
    answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_head()

    def watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            stop(self.head_timer)
            self.head_timer = None
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.answer_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        stop(self.answer_timer)
        self.answer_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        stop(self.head_timer)
        stop(self.answer_timer)


def stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()


# ---- requests ------------------------------------------------------------------------------------------------------------------


class Load:
    """What all requests together hold at this moment; only the event loop's thread changes it."""

    def __init__(self) -> None:
        self.uploads = self.requests = self.bytes = 0
        self.large = asyncio.Semaphore(LARGE_REQUESTS)


def application(worker: "Worker", limits: Limits) -> Starlette:
    """Return the ASGI application that answers with ``worker``'s predictions."""
    load = Load()
    parsing = ThreadPoolExecutor(1, "graftwork-parse")
    decoding = ThreadPoolExecutor(cores(), "graftwork-decode")
    kind = inputs_of(worker.model.info)
    noun = NOUNS[name_of(worker.model.info)]
    room = asyncio.Semaphore(max(4, min(256, HELD_ARRAYS // (PIECE * worker.model.preprocess.example_bytes))))

    async def ping(request: Request) -> Response:
        return Response("\n", media_type="application/json")

    async def mlflow_version(request: Request) -> Response:
        return Response(version("mlflow"), media_type="application/json")

    async def invocations(request: Request) -> Response:
        held = contextlib.AsyncExitStack()  # what the request takes up until it is answered
        try:
            try:
                media = content_type(request.headers.get("content-type", ""), kind)
            except RefusedError:
                await drain(request)
                raise
            body = await receive(request, limits, load, held)
            if not body:
                raise RefusedError(400, f"the body is empty; send {noun}")
            if load.requests >= limits.requests:
                raise RefusedError(503, f"{limits.requests} requests are being worked on; try again")
            load.requests += 1
            try:
                if len(body) <= INLINE_BYTES:
                    items = parse(body, media, kind, noun, limits)
                else:
                    loop = asyncio.get_running_loop()
                    items = await loop.run_in_executor(parsing, parse, body, media, kind, noun, limits)
                del body
                found = await predict_items(items, worker, decoding, room)
                if found.size <= 5000:
                    return Response(answer(found, worker.model.classes), media_type="application/json")
                text = await asyncio.to_thread(answer, found, worker.model.classes)
                return Response(text, media_type="application/json")
            finally:
                load.requests -= 1
        except RefusedError as error:
            return refusal(error, request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to see it
        except asyncio.CancelledError:  # the service is being stopped, and the time for this request is over
            return refusal(RefusedError(503, "the service is being stopped", close=True), request)
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            log.error("500 %s", reason)
            return failure(500, "INTERNAL_ERROR", "the prediction failed; the service's log has the reason")
        finally:
            await held.aclose()

    async def http_error(request: Request, error: Exception) -> Response:
        status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "failed")
        message = f"{request.method} {one_line(request.url.path, 100)}: {detail}; there are POST /invocations, GET /ping, /health and /version"
        return failure(status, "ENDPOINT_NOT_FOUND" if status == 404 else "BAD_REQUEST", message)

    routes = [
        Route("/ping", ping),
        Route("/health", ping),
        Route("/version", mlflow_version),
        Route("/invocations", invocations, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: http_error})


def refusal(error: RefusedError, request: Request) -> Response:
    client = request.client.host if request.client else "?"
    log.warning("%s %s (%s)", error.status, one_line(error), client)
    headers = {"retry-after": "1"} if error.status == 503 else {}
    if error.close:  # the rest of its body is not read, so the connection is of no more use
        headers["connection"] = "close"
    code = "TEMPORARILY_UNAVAILABLE" if error.status == 503 else "BAD_REQUEST"
    return failure(error.status, code, str(error), headers)


def failure(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps({"error_code": code, "message": one_line(message)})
    return Response(text, status, headers, "application/json")


class Media(NamedTuple):
    type: str
    charset: str


def content_type(header: str, inputs: Inputs) -> Media:
    """Return the media type, one of those that ``parse`` takes.

    Raises:
        RefusedError: 415.
    """
    kind, *parameters = (part.strip().lower() for part in header.split(";"))
    body = inputs.is_body(kind)
    if kind not in ("application/json", "text/csv") and not body:
        raise RefusedError(
            415,
            f"content type {one_line(header, 80)!r}: send application/json, text/csv, or {inputs.BODY}",
            close=True,
        )
    charset = dict(p.partition("=")[::2] for p in parameters).get("charset", "utf-8").strip('"')
    if charset not in ("utf-8", "utf8", "us-ascii") and not (kind == "text/plain" and is_charset(charset)):
        raise RefusedError(415, f"charset {one_line(charset, 40)}: send UTF-8", close=True)
    return Media(kind, charset)


def is_charset(name: str) -> bool:
    """Tell whether Python knows the character set; among its codecs there are compressors and the like, which are none."""
    try:
        return bool(codecs.lookup(name)._is_text_encoding) and isinstance(b"".decode(name), str)
    except (LookupError, ValueError, UnicodeError):
        return False


async def receive(request: Request, limits: Limits, load: Load, held: contextlib.AsyncExitStack) -> bytes:
    """Return the request's body; ``held`` gives back the room that it takes.

    A large one waits for others to be done before more of it is read. Small ones do not, whoever dawdles with a large one.

    Raises:
        RefusedError: 413, larger than allowed; 408, not there in time; 503, too much is arriving.
    """
    too_large = RefusedError(413, f"the request is larger than {limits.request_bytes:,} bytes; send less", close=True)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.request_bytes:
        await drain(request)
        raise too_large
    if load.uploads >= limits.uploads:
        raise RefusedError(503, f"{limits.uploads} requests are arriving; try again", close=True)
    load.uploads += 1
    parts: list[bytes] = []
    length, more, large, waiting = 0, True, False, False
    try:
        async with asyncio.timeout(limits.seconds):
            while more:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise ClientDisconnect
                part, more = message.get("body", b""), message.get("more_body", False)
                length += len(part)
                if length > limits.request_bytes:
                    raise too_large
                if length > LARGE_BYTES and not large:
                    waiting = True
                    await held.enter_async_context(load.large)
                    large, waiting = True, False
                if not large:
                    hold(load, len(part), held)
                parts.append(part)
    except TimeoutError:
        if waiting:
            raise RefusedError(503, "other large requests are being worked on; try again", close=True) from None
        raise RefusedError(
            408, f"the request has not arrived within {limits.seconds:g} s ({length:,} bytes of it)", close=True
        ) from None
    except RefusedError:
        parts.clear()
        if more:
            await drain(request)
        raise
    finally:
        load.uploads -= 1
    return parts[0] if len(parts) == 1 else b"".join(parts)


def hold(load: Load, count: int, held: contextlib.AsyncExitStack) -> None:
    if load.bytes + count > HELD_BYTES:
        raise RefusedError(503, "too many bytes are waiting; try again", close=True)
    load.bytes += count

    def give_back() -> None:
        load.bytes -= count

    held.callback(give_back)


async def drain(request: Request) -> None:
    """Read and throw away what is still sent, for a while: who sends while the connection is closed never sees why.

    Who asked whether to send at all ("Expect: 100-continue") is answered at once.
    """
    if request.headers.get("expect"):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN):
            while (message := await request.receive())["type"] == "http.request" and message.get("more_body"):
                pass


# ---- what a request holds --------------------------------------------------------------------------------------------------------


def parse(body: bytes, media: Media, kind: Inputs, noun: str, limits: Limits) -> list[Item]:
    """Return a request's examples, checked as far as is cheap.

    Raises:
        RefusedError: 400, and 413 for too many examples.
    """
    if kind.is_body(media.type):
        try:
            return [kind.from_body(body, media.charset)]
        except BrokenExampleError as error:
            raise RefusedError(400, f"input 0: {one_line(error, 120)}") from None
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"the body is not UTF-8 (byte {error.start})") from None
    if media.type == "application/json" and sum(map(body.count, (b",", b"[", b"{"))) > VALUES:
        raise RefusedError(413, f"more than {VALUES:,} values of JSON in a request; send {noun} as {kind.SEND}")
    values = from_csv(text, kind) if media.type == "text/csv" else from_json(text, kind)
    if len(values) > limits.examples:
        raise RefusedError(413, f"{len(values):,} {noun} in a request, {limits.examples:,} are allowed; send fewer")
    return [to_item(value, position, kind) for position, value in enumerate(values)]


def from_json(text: str, kind: Inputs) -> list[Any]:
    """Return the values of the examples' column of MLflow's four JSON forms."""
    try:
        payload = json.loads(text, parse_constant=not_json)
    except RecursionError:
        raise RefusedError(400, "invalid JSON: nested too deep") from None
    except ValueError as error:
        raise RefusedError(400, f"invalid JSON: {one_line(error, 120)}") from None
    given = [name for name in FORMATS if name in payload] if isinstance(payload, dict) else []
    if len(given) != 1 or set(payload) - {given[0], "params"}:  # params are MLflow's; this model has none
        raise RefusedError(400, f"send a JSON object with one of {', '.join(FORMATS)}")
    name, value = given[0], payload[given[0]]
    if name == "dataframe_split":
        columns, data = (value.get("columns"), value.get("data")) if isinstance(value, dict) else (None, None)
        if not isinstance(columns, list) or not columns or not isinstance(data, list):
            raise RefusedError(400, f'{name}: send {{"columns": ["{kind.COLUMN}"], "data": [["{kind.SAMPLE}"], ...]}}')
        place = columns.index(column(columns, kind))
        return [cell(row, place, n, kind) for n, row in enumerate(data)]
    if isinstance(value, dict) and name in ("instances", "inputs"):  # {column: values}
        value = value.get(column(list(value), kind)) if value else None
    if not isinstance(value, list):
        raise RefusedError(400, f"{name}: send a list, with an item an example")
    if name == "dataframe_records" and not all(isinstance(row, dict) for row in value):
        raise RefusedError(400, f'{name}: send [{{"{kind.COLUMN}": "{kind.SAMPLE}"}}, ...]')
    first = column(list(value[0]), kind) if value and isinstance(value[0], dict) else kind.COLUMN
    return [cell(row, first, n, kind) if isinstance(row, dict) else only(row) for n, row in enumerate(value)]


def not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def column(names: list[Any], kind: Inputs) -> Any:
    try:
        return kind.column(names)
    except ValueError as error:
        raise RefusedError(400, str(error)) from None


def cell(row: Any, place: Any, position: int, kind: Inputs) -> Any:
    try:
        if isinstance(row, dict | list):
            return row[place]
    except (IndexError, KeyError):
        pass
    raise RefusedError(400, f"input {position}: has no {kind.COLUMN}") from None


def only(row: Any) -> Any:
    """Return the text of a row of one column, which the pyfunc's table may be sent as; others as they are."""
    return row[0] if isinstance(row, list) and len(row) == 1 and isinstance(row[0], str) else row


def from_csv(text: str, kind: Inputs) -> list[Any]:
    """Return the examples' column; the first line has the names, as ``pandas.DataFrame.to_csv`` writes it."""
    csv.field_size_limit(2**31 - 1)  # the request is bounded already
    try:
        rows = [row for row in csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True) if row]
    except csv.Error as error:
        raise RefusedError(400, f"invalid CSV: {one_line(error, 120)}") from None
    names = rows[0] if rows else []
    if not names or not kind.is_header(names, len(rows) > 1):
        raise RefusedError(400, f"invalid CSV: the first line must name the columns: {kind.COLUMN}")
    place = names.index(column(names, kind))
    return [cell(row, place, position, kind) for position, row in enumerate(rows[1:])]


def to_item(value: Any, position: int, kind: Inputs) -> Item:
    """Check one value; it is decoded later, in parallel."""
    try:
        found = kind.check(value)
    except (BrokenExampleError, ValueError, TypeError) as error:
        raise RefusedError(400, f"input {position}: {one_line(error, 120)}") from None
    if found is None:
        what = "empty" if value == "" else "null" if value is None else f"a {type(value).__name__}"
        raise RefusedError(400, f"input {position}: is {what}; send {kind.SEND}")
    return found


# ---- predictions ---------------------------------------------------------------------------------------------------------------


async def predict_items(
    items: list[Item], worker: "Worker", decoding: ThreadPoolExecutor, room: asyncio.Semaphore
) -> Floats:
    """Return the probabilities of ``items``, shape (N, classes).

    Raises:
        RefusedError: an example cannot be used; the first such is named.
    """
    if not items:
        return np.zeros((0, len(worker.model.classes)), np.float32)
    kind = inputs_of(worker.model.info)
    mine = asyncio.Semaphore(cores() + 1)  # pieces of one request that are under way: others get their turn
    failed = False

    def start(position: int, future: "Future[Floats]") -> None:
        try:
            examples = []
            for n, item in enumerate(items[position : position + PIECE], position):
                try:
                    examples.append(kind.example(item, worker.model.preprocess))
                except (BrokenExampleError, OSError, ValueError) as error:
                    raise RefusedError(400, f"input {n}: {one_line(error, 120)}") from None
            worker.submit(examples, future)
        except BaseException as error:
            future.set_exception(error)

    async def piece(position: int) -> Floats | None:
        nonlocal failed
        async with mine, room:
            if failed:
                return None  # an earlier piece has it
            future: Future[Floats] = Future()
            future.set_running_or_notify_cancel()  # from here on it is finished, whoever still waits for it
            decoding.submit(start, position, future)
            try:
                return await asyncio.wrap_future(future)
            except BaseException:
                failed = True
                raise

    if len(items) <= PIECE:
        found: list[Any] = [await piece(0)]
    else:
        found = await asyncio.gather(*map(piece, range(0, len(items), PIECE)), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
    return np.concatenate(found)


def answer(found: Floats, classes: list[str]) -> bytes:
    """Return MLflow's JSON of the pyfunc's table."""
    names = [f"p_{c}" for c in classes]
    labels = [classes[n] for n in found.argmax(1)]
    rows = [{"label": c, **dict(zip(names, p, strict=True))} for c, p in zip(labels, found.tolist(), strict=True)]
    return json.dumps({"predictions": rows}, allow_nan=False).encode()


class Worker:
    """The one thread that runs the network: it takes what waits, up to a micro-batch, and never waits for more."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._waiting: queue.SimpleQueue[tuple[list[Array], Future[Floats]] | None] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name="graftwork-network", daemon=True)
        self._thread.start()
        self._ready.result()

    def submit(self, examples: list[Array], future: "Future[Floats]") -> None:
        """Have ``future`` hold the probabilities of ``examples`` some time."""
        self._waiting.put((examples, future))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(5)

    def _work(self) -> None:
        try:
            # Here, since some of what torch keeps for a graph or sets for threads is the thread's own.
            run, most = fast_network(self.model)
            self._ready.set_result(None)
        except BaseException as error:
            self._ready.set_exception(error)
            return
        ended = False
        while not ended and (first := self._waiting.get()) is not None:
            batch, count = [first], len(first[0])
            with contextlib.suppress(queue.Empty):
                while count < most:
                    following = self._waiting.get_nowait()
                    if following is None:
                        ended = True
                        break
                    batch.append(following)
                    count += len(following[0])
            try:
                logits = run([example for examples, _ in batch for example in examples])
                found = probabilities(logits, self.model.temperature)
                position = 0
                for examples, future in batch:
                    future.set_result(found[position : position + len(examples)])
                    position += len(examples)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)


def fast_network(model: Model) -> tuple[Callable[[Sequence[Array]], Floats], int]:
    """Return a function from examples to logits (N, classes), and how many examples are best taken at once.

    On a CPU, where all examples have one shape, fused graphs for a few numbers of them, each compared with the plain network first; a
    batch is made up of them, by what each was seen to take. Elsewhere, or where none is equal, the plain network.
    """
    from graftwork.execution import Inference, default_execution, set_threads
    from graftwork.settings import ExecutionSettings

    usual = default_execution(ExecutionSettings(), model.device, model.preprocess)
    set_threads(usual)
    plain = Inference(model.network, model.preprocess, model.device, usual)
    preprocess, most = model.preprocess, usual.micro_batch
    sample = preprocess.stack(inputs_of(model.info).samples(preprocess, min(most, 32)))
    # Also where there are no graphs: the first pass is slow.
    wanted = probabilities(plain(sample).numpy(), model.temperature)
    seconds: dict[int, float] = {}
    graphs: dict[int, Any] = {}
    weights = sum(p.numel() * p.element_size() for p in model.network.parameters())
    worthwhile = model.device.type == "cpu" and "traced" in preprocess.options("cpu")["engine"]
    few = GRAPHS[: max(1, GRAPH_BYTES // max(1, weights))] if worthwhile else ()
    for size in (n for n in few if n <= most):
        run = Inference(model.network, preprocess, model.device, usual._replace(engine="traced", micro_batch=size))
        try:
            off = probabilities(run(sample).numpy(), model.temperature) - wanted
        except Exception:  # this network cannot be traced
            break
        if not np.abs(off).max() <= SAME:
            break
        graphs[size] = run
        seconds[size] = min(timed(run, sample[:size]) for _ in range(3))
    parts = make_up(seconds, most) if graphs else {}

    def logits(examples: Sequence[Array]) -> Floats:
        batch = preprocess.stack(examples)
        found, position = [], 0
        while position < len(batch):
            count = parts.get(min(most, len(batch) - position), most)
            run = graphs.get(count, plain)
            found.append(run(batch[position : position + count]).numpy())
            position += count
        return np.concatenate(found)

    return logits, most


def make_up(seconds: dict[int, float], most: int) -> dict[int, int]:
    """Return {n: the graph that a batch of n examples starts with}, such that the batch is done earliest; a graph takes ``seconds[size]``."""
    total, first = [0.0], {}
    for n in range(1, most + 1):
        first[n] = min(seconds, key=lambda size: seconds[size] + total[max(0, n - size)])
        total.append(seconds[first[n]] + total[max(0, n - first[n])])
    return first


def timed(run: Callable[[Any], Any], batch: Any) -> float:
    began = time.perf_counter()
    run(batch)
    return time.perf_counter() - began
