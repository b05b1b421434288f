"""The process that a local run's steps are forked from: what they import is imported once, while the first of them is at work.

Each step is a process of its own, and importing PyTorch, timm or Great Expectations takes seconds. A run starts this module once
(``python -m graftwork.pipelines.warm serve SOCKET``); it imports, and forks at every request. A step's command runs this file as a script, which hands
over its arguments, environment, folder and standard streams, and ends as the step ends. Where no process answers, it becomes the step itself.

Linux alone: elsewhere, system libraries do not survive a fork. Nothing here computes before a fork, so there are no threads to lose.

In a container, ``python -m graftwork.pipelines.warm stand-by MODULES`` imports, and then becomes the step whose command comes on its standard input: the
container of the next step is started while this one works.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

# In the order in which the steps need them. A step that comes earlier imports for itself what is still missing.
MODULES = (
    "kfp.dsl.executor",
    "graftwork.steps",
    "graftwork.validate",
    "great_expectations",
    "graftwork.features",
    "graftwork.baseline",
    "sklearn.linear_model",
    "graftwork.finetune",
    "graftwork.evaluate",
    "captum.attr",
    "cleanlab.filter",
    "graftwork.register",
)
ENDED = 5  # bytes of the answer: "e" and the exit status, or "s" and the signal


def ask(path: str, arguments: list[str]) -> NoReturn:
    """Have ``python ARGUMENTS`` run by the warm process at ``path``, and end as it ends."""
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(path)
        folder = os.getcwd()  # noqa: PTH109  no pathlib here: this script starts in the milliseconds that its few imports take
        request = {"arguments": arguments, "environment": dict(os.environ), "folder": folder}
        content = json.dumps(request).encode()
        socket.send_fds(client, [len(content).to_bytes(8, "big")], [0, 1, 2])
        client.sendall(content)
    except OSError:
        os.execv(sys.executable, [sys.executable, *arguments])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the step as well, whose end is waited for
    answer = b""
    while len(answer) < ENDED and (part := client.recv(ENDED - len(answer))):
        answer += part
    if len(answer) < ENDED:
        sys.exit("the process that starts the steps has ended")
    number = int.from_bytes(answer[1:], "big")
    if answer[:1] == b"s":
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(number)


def serve(path: str, modules: Sequence[str] = MODULES) -> dict[str, object]:
    """Import and fork, until the run ends; returns in the forked processes alone, with the request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    missing, running = list(modules), dict[int, socket.socket]()
    while True:
        ready, _, _ = select.select([listener, wake, 0], [], [], 0 if missing else None)
        if 0 in ready:  # the run's end of the pipe is closed: it has ended, be it by kill -9
            sys.exit()
        if wake in ready:
            with suppress(BlockingIOError):
                os.read(wake, 4096)
            report_ended(running)
        if listener in ready:
            client, _ = listener.accept()
            found = receive(client)
            if found is not None:
                request, streams = found
                gc.freeze()  # a collection in the step would touch, and so copy, every page
                if (process := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for other in (listener, client, *running.values()):
                        other.close()
                    os.close(wake)
                    os.close(waker)
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    return request
                running[process] = client
                for stream in streams:
                    os.close(stream)
        elif missing:
            with suppress(Exception):  # the step that needs it says what is wrong
                importlib.import_module(missing[0])
            del missing[0]


def receive(client: socket.socket) -> tuple[dict[str, object], list[int]] | None:
    """Return the request and the streams of a step; None where the step's command has ended meanwhile."""
    with suppress(OSError, ValueError):
        size, streams, _, _ = socket.recv_fds(client, 8, 3)
        wanted, content = int.from_bytes(size, "big"), b""
        while len(content) < wanted and (part := client.recv(wanted - len(content))):
            content += part
        if len(size) == 8 and len(content) == wanted:
            request: dict[str, object] = json.loads(content)
            return request, streams
        for stream in streams:
            os.close(stream)
    client.close()
    return None


def report_ended(running: dict[int, socket.socket]) -> None:
    """Tell the command of every process that has ended how it ended."""
    for process, client in list(running.items()):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            killed = os.WIFSIGNALED(status)
            number = os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
            with suppress(OSError):  # a command that was killed asks no more
                client.sendall((b"s" if killed else b"e") + number.to_bytes(4, "big"))
            client.close()
            del running[process]


def stand_by(modules: Sequence[str]) -> dict[str, object]:
    """Import, wait for a step's command, and fork: returns in the forked process alone, with the request; the other ends as that one ends."""
    import subprocess

    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    for module in modules:
        with suppress(Exception):  # the step that needs it says what is wrong
            importlib.import_module(module)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the run has ended
        sys.exit()
    # kfp's script writes the component to a file and calls Python: here it says what it would call Python with.
    command = [word.replace("python3", "printf '%s\\0'") if n < 3 else word for n, word in enumerate(json.loads(line))]
    said = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True).stdout
    gc.freeze()
    # A process of its own: its age is the step's, not that of the waiting, and it is not the container's first, which is deaf to signals.
    if (step := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        environment = os.environ | {"_KFP_RUNTIME": "true"}
        return {"arguments": said.decode().split("\0")[:-1], "environment": environment, "folder": os.getcwd()}  # noqa: PTH109
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(step, number))
    status = os.waitstatus_to_exitcode(os.waitpid(step, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def become(request: dict[str, object]) -> NoReturn:
    """Be the Python process that ``request`` asks for."""
    import atexit
    import runpy
    import threading
    import traceback

    environment, arguments = request["environment"], request["arguments"]
    assert isinstance(environment, dict) and isinstance(arguments, list)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(str(request["folder"]))
    sys.argv = arguments[1:]
    status = 0
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As Python ends, but for taking all modules apart: for this process alone, that copies every page of them, and takes four seconds.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        become(serve(sys.argv[2], sys.argv[3:] or MODULES))
    elif sys.argv[1] == "stand-by":
        become(stand_by(sys.argv[2:]))
    elif sys.argv[3:4] == ["-m"]:
        ask(sys.argv[2], sys.argv[3:])
    else:
        os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
