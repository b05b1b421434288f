"""Kill and restart PostgreSQL, the object store and MLflow in the midst of whole runs, and count what is lost or doubled.

    python benchmarks/outages.py --rounds 20 --output benchmarks/results      # about half an hour on two cores

The tracking server is that of ``mlflow/``: its entry point, a real PostgreSQL and SeaweedFS, accounts switched on, artifacts through
the server. A round is one ``graftwork run`` that trains another model, in which each of the three is killed once with SIGKILL at a
random moment and started again after a random pause. Then everything in the run's journals is looked up in the server, and after the
last round that of all rounds: runs, params, tags, each point of each metric, datasets, the bytes of each artifact, versions with
their weights, decisions and aliases.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import graftwork  # noqa: F401  before the tests' folder is on the path, which holds one of this name

LOOKED = "Looked up in the server after each round: its values and files, and all runs, versions and aliases; after the last "
sys.path.append(str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave everything there")
    options = parser.parse_args()
    import tracking_server

    why = tracking_server.missing()
    if why:
        sys.exit(f"outages: {why}")
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graftwork-outages-")))
        folder.mkdir(parents=True, exist_ok=True)
        report = measure(folder, options.rounds, options.epochs, options.seed, options.output)
    sys.exit(bool(report["wrong"]))


def measure(folder: Path, rounds: int, epochs: int, seed: int, output: Path) -> dict[str, Any]:
    import tracking_server
    from conftest import make_weights
    from outage import TINY, audit, command, play, run_once

    chance = random.Random(seed)
    weights = make_weights(TINY, folder / "weights.safetensors")
    place = folder / "work"
    with tracking_server.serve(folder) as server:
        # The first, undisturbed, says how long a run takes, and that the audit finds nothing where nothing happened.
        done, span = run_once(server, place, command(weights, epochs, 0))
        if done.returncode:
            sys.exit(f"outages: the undisturbed run failed: {done.stdout}{done.stderr}")
        found = audit(server, place)
        print(f"undisturbed {span:5.1f} s; {words(found)}", flush=True)
        report: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "undisturbed_seconds": round(span, 1),
            "epochs": epochs,
            "rounds": [],
            "wrong": [f"undisturbed: {line}" for line in found["wrong"]],
        }
        for number in range(1, rounds + 1):
            before = {path.name for path in (place / "runs").iterdir()}
            played = play(server, place, command(weights, epochs, number), span, chance)
            span = played["tries"][0]["seconds"] if number % 5 == 4 else 0.7 * played["tries"][0]["seconds"]
            found = audit(server, place, before if number < rounds else set())
            new = [line for line in found["wrong"] if line not in report["wrong"]]
            if played["tries"][-1]["status"]:
                new.append(f"LOST: round {number} never ended well: {played['tries'][-1]['said']}")
            report["rounds"].append({"round": number, **played, "wrong": new})
            report["wrong"] += new
            report |= {"counts": found["counts"], "whole": number == rounds}
            write(report, output)
            told = "; ".join(f"{k['server']} at {k['after']} s for {k['away']} s" for k in played["kills"])
            took = " + ".join(str(t["seconds"]) for t in played["tries"])
            print(f"round {number:2d}: {told}; took {took} s; {words(found)}", flush=True)
            for line in new:
                print(f"    {line}", flush=True)
            for one in played["tries"]:
                if one["status"]:
                    print(f"    status {one['status']}: {one['said']}", flush=True)
    return report


def words(found: dict[str, Any]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(found["counts"].items())) + f"; {len(found['wrong'])} wrong"


def write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "outages.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rounds, counts = report["rounds"], report["counts"]
    tries = Counter(len(r["tries"]) for r in rounds)
    in_time = sum(kill["after"] < r["tries"][0]["seconds"] for r in rounds for kill in r["kills"])
    lost, doubled = (sum(word in line for line in report["wrong"]) for word in ("LOST", "DOUBLED"))
    lines = [
        "# Outages: PostgreSQL, the object store and MLflow, each killed and restarted in mid-run",
        "",
        f"`python benchmarks/outages.py --rounds {len(rounds)}` on {report['machine']}. An undisturbed run takes "
        f"{report['undisturbed_seconds']} s. {len(rounds)} rounds, {3 * len(rounds)} kills with SIGKILL, {in_time} of them in "
        f"mid-run (a run may be done sooner than expected): **{lost} lost, {doubled} doubled, {len(report['wrong'])} wrong in all**.",
        "",
        ("Looked up in the server after the last round, for all rounds: " if report.get("whole") else LOOKED)
        + ", ".join(f"{n:,} {what}" for what, n in counts.items())
        + ".",
        f"The command had to be given once in {tries[1]} rounds, and again in {len(rounds) - tries[1]}, where the registry or "
        "its store of files did not answer when the model was to be registered (one line, status 1; what was finished is reused).",
        "",
        "| round | killed, s after the start (s until it served again) | tries | seconds | wrong |",
        "|---:|---|---:|---:|---:|",
    ]
    for r in rounds:
        kills = ", ".join(f"{k['server']} {k['after']} ({k['away']})" for k in r["kills"])
        seconds = " + ".join(str(t["seconds"]) for t in r["tries"])
        lines.append(f"| {r['round']} | {kills} | {len(r['tries'])} | {seconds} | {len(r['wrong'])} |")
    lines += ["", *(f"- {line}" for line in report["wrong"][:50])]
    (output / "outages.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
