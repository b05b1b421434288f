"""The service against the bare network: one image over HTTP, and many clients for a minute, with the service's memory.

    python benchmarks/serving.py MODEL --seconds 60 --output benchmarks/results

The bare network is ``network(x)``, eager, batch 1, fp32, in a process of its own with as many threads, in both memory formats, with threads
that wait by sleeping (as the service's do) and as OpenMP has them wait by default; the fastest of the four counts. All are measured in turns,
and at one pace.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = "import sys; from graftwork.pipelines.service import serve; serve(sys.argv[1], port=0)"
ROUNDS, SINGLES = 5, 40  # of measurements in turns, and images in each
# Seconds before each image. What a pass takes depends on it: on two virtual cores, a loop without rest made each twice as long. A request
# always brings some rest with it, so the bare network is measured at the same pace.
PAUSES = (0.0, 0.005, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Model folder")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line sets it
    if options.bare:
        bare_network(options.model)
        return
    images = pictures(64)
    began = time.perf_counter()
    server = start([sys.executable, "-c", SERVER, str(options.model)])
    bare: dict[str, subprocess.Popen[str]] = {}
    try:
        assert server.stdout
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        result: dict[str, Any] = {"start_seconds": round(time.perf_counter() - began, 1)}
        usual = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        for waiting, environment in (("sleeping", dict(os.environ)), ("OpenMP's default", usual)):
            bare[waiting] = start([sys.executable, __file__, str(options.model), "--bare"], environment)
        result |= single_image(port, bare, images)
        for process in bare.values():
            finish(process)
        result |= many_clients(port, server.pid, images, options.clients, options.seconds)
        result["largest_difference"] = compare(options.model, port, images)
    finally:
        for process in (server, *bare.values()):
            if process.poll() is None:
                finish(process)
    from graftwork.model import read_info

    info = read_info(options.model)
    result |= {"backbone": info["backbone"], "size": info["preprocess"]["size"], "exit_status": server.returncode}
    result |= {"machine": machine()}
    print(json.dumps(result, indent=1))
    write(result, options.output)


def pictures(count: int) -> list[bytes]:
    """Return JPEGs of 200 pixels a side, as a client may send them: smooth, with some noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((200, 200), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate(timeout=30)


def bare_network(model: Path) -> None:
    """For every line of input, a pause in seconds, print the milliseconds of ``SINGLES`` passes: plain, by format, and as the service's."""
    import torch

    from graftwork.model import load_model
    from graftwork.serving import fast_network

    loaded = load_model(model, "cpu")
    size = loaded.preprocess.size
    fast, _ = fast_network(loaded)
    pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8).numpy()
    x = torch.randn(1, 3, size, size)
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        found: dict[str, list[float]] = {}
        with torch.inference_mode():
            for memory_format in (torch.contiguous_format, torch.channels_last):
                network, y = loaded.network.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
                found[str(memory_format).removeprefix("torch.")] = paced(lambda n: network(y), float(line))  # noqa: B023
        found["service"] = paced(lambda n: fast(pixels), float(line))
        print(json.dumps(found), flush=True)


def paced(function: Callable[[int], Any], pause: float) -> list[float]:
    """Return the milliseconds of ``SINGLES`` calls, after five that are not counted, with ``pause`` seconds before each."""
    milliseconds = []
    for n in range(SINGLES + 5):
        time.sleep(pause)
        began = time.perf_counter()
        function(n)
        milliseconds.append(1000 * (time.perf_counter() - began))
    return milliseconds[5:]


def body_of(image: bytes) -> bytes:
    return json.dumps({"instances": [base64.b64encode(image).decode()]}).encode()


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes]:
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def single_image(port: int, bare: dict[str, subprocess.Popen[str]], images: list[bytes]) -> dict[str, Any]:
    threads = {int(process.stdout.readline()) for process in bare.values() if process.stdout}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    bodies = [body_of(image) for image in images]

    def request(n: int) -> None:
        status, text = post(connection, bodies[n % len(bodies)])
        assert status == 200, text

    spent: dict[tuple[float, str], list[float]] = {}
    for turn in range(ROUNDS + 1):
        for pause in PAUSES:
            found = {}
            for waiting, process in bare.items():
                assert process.stdin and process.stdout
                process.stdin.write(f"{pause}\n")
                process.stdin.flush()
                found |= {f"{name}, {waiting}": ms for name, ms in json.loads(process.stdout.readline()).items()}
            found["http"] = paced(request, pause)
            for name, milliseconds in found.items():
                if turn:  # the first is a warm-up
                    spent.setdefault((pause, name), []).extend(milliseconds)
    connection.close()
    paces = []
    for pause in PAUSES:
        medians = {name: round(statistics.median(ms), 2) for (p, name), ms in spent.items() if p == pause}
        plain = min(ms for name, ms in medians.items() if name != "http" and not name.startswith("service"))
        row = {"pause_ms": 1000 * pause, "bare_ms": plain, "service_network_ms": medians["service, sleeping"]}
        row |= {"http_ms": medians["http"], "http_p95_ms": statistics.quantiles(spent[pause, "http"], n=20)[-1]}
        paces.append({**row, "times": round(medians["http"] / plain, 2), "medians": medians})
    return {"threads": max(threads), "single": paces}


def many_clients(port: int, pid: int, images: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Have ``clients`` send one image after the other, each over a connection of its own."""
    import psutil

    process = psutil.Process(pid)
    latencies: list[list[float]] = [[] for _ in range(clients)]
    errors: list[str] = []
    bodies = [body_of(image) for image in images]

    def client(number: int, end: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        n = number
        while time.perf_counter() < end:
            began = time.perf_counter()
            try:
                status, text = post(connection, bodies[n % len(bodies)])
                if status != 200:
                    errors.append(f"{status} {text[:200]!r}")
            except OSError as error:
                errors.append(repr(error))
            latencies[number].append(time.perf_counter() - began)
            n += clients
        connection.close()

    def crowd(duration: float) -> None:
        end = time.perf_counter() + duration
        threads = [threading.Thread(target=client, args=(number, end)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    idle = process.memory_info().rss / 2**20
    crowd(3)  # buffers of every thread are there after this
    for mine in latencies:
        mine.clear()
    memory = [process.memory_info().rss / 2**20]
    began = time.perf_counter()
    for _ in range(2):
        crowd(seconds / 2)
        memory.append(process.memory_info().rss / 2**20)
    wall = time.perf_counter() - began
    every = [1000 * latency for mine in latencies for latency in mine]
    return {
        "clients": clients,
        "seconds": round(wall, 1),
        "requests": len(every),
        "errors": len(errors),
        "first_errors": errors[:3],
        "requests_per_second": round(len(every) / wall, 1),
        "median_ms": round(statistics.median(every), 1),
        "p99_ms": round(statistics.quantiles(every, n=100)[-1], 1),
        "idle_mib": round(idle),
        "memory_mib": [round(m) for m in memory],
    }


def compare(model: Path, port: int, images: list[bytes]) -> float:
    """Return the largest difference between the service's probabilities and those of the plain network."""
    import numpy as np

    from graftwork.images import decode, fit
    from graftwork.model import load_model, predict

    loaded = load_model(model, "cpu")
    wanted = predict(loaded, [fit(decode(image), loaded.preprocess) for image in images])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    together = json.dumps({"instances": [base64.b64encode(image).decode() for image in images]}).encode()
    answers = [json.loads(post(connection, together)[1])["predictions"]]
    answers.append([json.loads(post(connection, body_of(image))[1])["predictions"][0] for image in images])
    names = [f"p_{c}" for c in loaded.classes]
    found = [np.array([[row[name] for name in names] for row in rows]) for rows in answers]
    return max(float(np.abs(probabilities - wanted).max()) for probabilities in found)


def machine() -> str:
    import torch

    from graftwork.execution import processor
    from graftwork.parallel import cores

    return f"{processor()}, {cores()} cores, torch {torch.__version__}"


def write(result: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "serving.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    memory = " / ".join(f"{m:,}" for m in result["memory_mib"])
    singles = "\n".join(
        f"| {row['pause_ms']:.0f} ms | {row['bare_ms']:.1f} ms | {row['service_network_ms']:.1f} ms "
        f"| {row['http_ms']:.1f} ms ({row['http_p95_ms']:.1f} ms) | {row['times']:.2f} times |"
        for row in result["single"]
    )
    text = f"""{result["backbone"]} at {result["size"]} px; {result["machine"]}. Clients run on the same cores.

One image, {result["threads"]} threads, medians. Bare: eager, batch 1, the fastest of two memory formats and two ways in which threads wait. HTTP:
JSON with base64, decoding and preprocessing included. Without a pause the two are not alike: a request brings some rest with it, a loop
none, and a pass in a loop takes twice as long here. The rows with a pause are the comparison.

| pause before each | bare network | the service's fused graph alone | over HTTP (95% within) | HTTP against bare |
|---|---:|---:|---:|---:|
{singles}

| {result["clients"]} clients, an image a request, {result["seconds"]:.0f} s | |
|---|---:|
| requests a second | {result["requests_per_second"]:.0f} |
| errors of {result["requests"]:,} requests | {result["errors"]} |
| latency, median / 99% | {result["median_ms"]:.0f} / {result["p99_ms"]:.0f} ms |
| memory before the first of them | {result["idle_mib"]:,} MiB |
| memory at the start / middle / end | {memory} MiB |
| start to first answer possible | {result["start_seconds"]:.1f} s |
| largest difference of a probability from the plain network's | {result["largest_difference"]:.1e} |
"""
    (output / "serving.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
