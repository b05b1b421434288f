"""Fine-tuning: LP-FT from the baseline's head (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution"), with BatchNorm's statistics frozen, layer-wise rates, an average of the weights, and the best epoch kept.

A run that is killed goes on from its last checkpoint and ends with the same weights, bit for bit on CPU.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from graftwork import checkpoint
from graftwork.averaging import State, average, greedy_soup, wise_ft
from graftwork.batches import Examples
from graftwork.calibration import fit_temperature
from graftwork.convolutions import faster_gradients
from graftwork.dataset import Dataset
from graftwork.errors import UserError
from graftwork.execution import (
    Execution,
    Inference,
    Planned,
    default_execution,
    forward,
    halve,
    memory_format,
    plan_training,
    set_threads,
)
from graftwork.files import finished_folder, write_json
from graftwork.modality import Preprocess, backbones, name_of, transforms
from graftwork.model import read_info, read_tensors, ready_device, save_model
from graftwork.optimisation import (
    class_weights,
    epoch_order,
    make_optimizer,
    mixing,
    range_test,
    rate_factor,
    set_rates,
)
from graftwork.selection import METRICS, better, measure, merit, rank
from graftwork.settings import FineTuneSettings
from graftwork.strategies import Plan, freeze, frozen_share, has_batchnorm, plan

Progress = Callable[[int, int], None]
EpochReport = Callable[[int, dict[str, float]], None]


def fine_tune(
    dataset: Dataset,
    baseline: Path,
    settings: FineTuneSettings,
    folder: Path,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda message: None,
    on_epoch: EpochReport = lambda epoch, metrics: None,
) -> dict[str, Any]:
    """Train from the Model artifact ``baseline`` and write the Model artifact ``folder``; return its ``model.json``.

    The same dataset, baseline and settings give the same weights, bit for bit on CPU, whether or not the run was killed and went on:
    where ``GRAFTWORK_CHECKPOINTS`` names a folder, checkpoints lie there. With several ``seeds``, the best on validation is kept.
    """
    if settings.seeds > 1:
        return several_seeds(dataset, baseline, settings, folder, progress, note, on_epoch)
    info = read_info(baseline)
    with checkpoint.job_folder(
        "fine-tune", dataset.digest, info["sha256"], settings.model_dump(), note=note
    ) as checkpoints:
        found = train(dataset, baseline, info, settings, folder, checkpoints, progress, note, on_epoch)
        checkpoint.remove(checkpoints)
    return found


def several_seeds(
    dataset: Dataset,
    baseline: Path,
    settings: FineTuneSettings,
    folder: Path,
    progress: Progress,
    note: Callable[[str], None],
    on_epoch: EpochReport,
) -> dict[str, Any]:
    """Train once a seed, from ``settings.seed`` on; write the model that is best on validation, with what each of them reached.

    Runs on few examples differ by the seed alone as much as by most settings (Mosbach et al. 2021, "On the Stability of Fine-tuning BERT").
    A seed that is done stays in the job's folder until all are: a run that was killed trains none of them twice.
    """
    made_of = ("seeds", dataset.digest, read_info(baseline)["sha256"], settings.model_dump())
    with checkpoint.job_folder("fine-tune", *made_of, note=note) as kept, tempfile.TemporaryDirectory() as temporary:
        place, found = kept or Path(temporary), []
        for number in range(settings.seeds):
            own = settings.model_copy(update={"seed": settings.seed + number, "seeds": 1})
            model = place / f"seed-{own.seed}"
            note(f"seed {own.seed}: {number + 1} of {settings.seeds}")
            if not (model / "model.json").is_file():
                fine_tune(
                    dataset,
                    baseline,
                    own,
                    model,
                    lambda done, total, n=number: progress(n * total + done, settings.seeds * total),  # type: ignore[misc]
                    note,
                    # One curve has the metrics' own names; the others stand beside it.
                    on_epoch
                    if not number
                    else lambda e, m, s=own.seed: on_epoch(e, {f"seed_{s}/{k}": v for k, v in m.items()}),  # type: ignore[misc]
                )
            found.append((own.seed, model, read_info(model)))
        spread = [
            {
                "seed": seed,
                "epoch": info["selection"]["epoch"],
                "seconds": info["training_seconds"],
                **info["selection"]["val"],
            }
            for seed, _, info in found
        ]
        seed, best, info = max(found, key=lambda one: rank(settings.metric, one[2]["selection"]["val"]))
        values = [one[f"val_{settings.metric}"] for one in spread]
        note(
            f"{settings.seeds} seeds: val_{settings.metric} {min(values):.4f} to {max(values):.4f}, mean {np.mean(values):.4f}, "
            f"standard deviation {np.std(values, ddof=1):.4f}; seed {seed} is kept"
        )
        info |= {
            "seeds": spread,
            "seconds": info["seconds"] + sum(one["seconds"] for one in spread) - info["training_seconds"],
            "training_seconds": sum(one["seconds"] for one in spread),
        }
        with finished_folder(folder) as partial:
            for file in best.iterdir():
                shutil.copyfile(file, partial / file.name)
            write_json(partial / "model.json", info)
        checkpoint.remove(kept)
    return info


def train(
    dataset: Dataset,
    baseline: Path,
    info: dict[str, Any],
    settings: FineTuneSettings,
    folder: Path,
    checkpoints: Path | None,
    progress: Progress,
    note: Callable[[str], None],
    on_epoch: EpochReport,
) -> dict[str, Any]:
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed % 2**32)  # timm's Mixup draws from it
    torch.use_deterministic_algorithms(True, warn_only=True)
    generator = torch.Generator().manual_seed(settings.seed)  # order and augmentation
    device = ready_device()
    made = backbones(info)
    preprocess = transforms(info).read_preprocess(info["preprocess"], baseline)
    examples = Examples(dataset, "train", preprocess, memory_share=settings.memory_share)
    val = Examples(dataset, "val", preprocess, memory_share=settings.memory_share)
    classes = len(dataset.classes)
    counts = torch.bincount(examples.targets, minlength=classes)
    imbalance = float(counts.max() / counts[counts > 0].min())

    network = made.build(info["backbone"], info["backbone_args"], classes)
    todo = plan(settings, len(examples), classes, has_batchnorm(network), imbalance, made.RECIPE)
    for reason in todo.reasons:
        note(reason)
    scratch = todo.strategy == "scratch"
    if todo.batch_size < 2 and not todo.frozen_statistics:
        raise UserError(
            "setting batch_size = 1: BatchNorm learns nothing from one example; to train its statistics, use at least 2"
        )
    augmentation = made.training_augmentation(settings.flip, settings.shift, info.get("augmentation", {}))
    if not scratch:
        load_start(network, baseline, info, settings.lp_ft)
    faster_gradients(network)
    network = network.to(device, memory_format=torch.channels_last)
    start = {}
    if settings.wise_ft or made.RECIPE.grafts:
        start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    freeze(network, todo.strategy, info["head"])

    steps_per_epoch = math.ceil(len(examples) / todo.batch_size)
    steps = todo.epochs * steps_per_epoch
    patience = max(settings.patience, math.ceil(made.RECIPE.patient_steps / steps_per_epoch))
    if todo.strategy == "gradual":
        network.requires_grad_(True)  # every layer has its place in the optimizer; which learn is set epoch by epoch
    optimizer = make_optimizer(network, todo, settings, steps)
    averaged = settings.ema_decay and settings.optimizer != "schedule-free" and steps >= made.RECIPE.ema_steps
    ema = ModelEmaV3(network, decay=settings.ema_decay, use_warmup=True, warmup_power=0.75) if averaged else None
    mix = mixing(todo, settings, classes)
    weights = class_weights(examples.targets, classes).to(device) if todo.balance == "weights" else None
    loss_of = make_loss(settings.label_smoothing, weights)
    wanted = tuple(dict.fromkeys(("accuracy", "loss", settings.metric)))

    restored = checkpoint.load(checkpoints, note) if checkpoints else None
    planned = execution_plan(network, info, todo, settings, examples, preprocess, device)
    note(f"plan: {planned}")
    # What goes on is run as it was begun, whatever would be chosen now.
    execution = Execution(*restored[1]["execution"]) if restored else planned.execution
    set_threads(execution)
    network = network.to(memory_format=memory_format(execution))
    runner = torch.compile(network) if execution.engine == "compiled" else network
    scaler = torch.amp.GradScaler(device.type, enabled=execution.precision == "fp16" and device.type == "cuda")

    def val_logits(candidate: Any) -> npt.NDArray[np.float32]:
        evaluating(optimizer)
        if not len(val):
            return np.zeros((0, classes), np.float32)
        usual = default_execution(settings, device, preprocess)._replace(precision="fp32", engine="eager")
        usual = usual._replace(memory_format=execution.memory_format)
        run = Inference(candidate, preprocess, device, usual, note)
        return torch.cat([run(batch) for _, batch in val.in_order(torch.arange(len(val)).split(256))]).numpy()

    def validate(candidate: Any) -> dict[str, float]:
        return measure(val_logits(candidate), val.targets.numpy(), wanted)

    def train_step(indices: Tensor, batch: Tensor) -> Tensor:
        """Run one batch forward and backward, in parts where memory wants it, and step; return the mean loss."""
        nonlocal execution
        batch = made.augment(batch.to(device, non_blocking=True), augmentation, generator)
        targets: Tensor = examples.targets[indices].to(device, non_blocking=True)
        x = preprocess.to_input(batch, device)
        if mix and len(x) > 1:
            even = len(x) - len(x) % 2  # timm mixes pairs: the odd one of a last batch stays as it is
            mixed, soft = mix(x[:even], targets[:even])
            rest = F.one_hot(targets[even:], classes).to(soft) * (1 - settings.label_smoothing)
            rest += settings.label_smoothing / classes
            x, targets = torch.cat([mixed, x[even:]]), torch.cat([soft, rest])
        while True:
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            try:
                for part, wanted_part in zip(
                    x.split(execution.micro_batch), targets.split(execution.micro_batch), strict=True
                ):
                    loss = loss_of(forward(runner, part, execution, device), wanted_part)
                    loss = loss * share_of(wanted_part, targets, weights)
                    scaler.scale(loss).backward()
                    total += loss.detach()
                break
            except torch.OutOfMemoryError:
                if not todo.frozen_statistics:
                    raise UserError(
                        f"out of memory with batches of {len(x)}, which BatchNorm learns from as a whole; use a smaller batch_size"
                    ) from None
            # Behind the exception, whose trace holds on to what filled the memory.
            execution = halve(execution._replace(micro_batch=min(execution.micro_batch, len(x))), device, note)
        if settings.clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        return total

    if settings.rate_test and not restored:
        todo = todo._replace(learning_rate=find_rate(network, optimizer, todo, examples, train_step, generator, note))
        optimizer = make_optimizer(network, todo, settings, steps)

    # Epoch 0 is the probe itself: if no epoch beats it, it is what is kept.
    at = {"step": 0, "epoch": 1, "position": 0, "seconds": 0.0, "best_epoch": 0, "total_seconds": 0.0, "stopped": False}
    history: list[dict[str, float]] = []
    best: State = {}
    best_metrics: dict[str, float] = {}
    shelf: list[tuple[int, dict[str, float], State]] = []  # for the soup: the best epochs, the best first
    order, loss_sum = torch.zeros(0, dtype=torch.long), torch.zeros((), device=device)

    if restored:
        tensors, facts = restored
        at, history, best_metrics = facts["at"], facts["history"], facts["best_metrics"]
        todo = todo._replace(learning_rate=facts["learning_rate"])
        network.load_state_dict(part_of(tensors, "network"))
        if ema:
            ema.module.load_state_dict(part_of(tensors, "ema"))
        restore_optimizer(optimizer, part_of(tensors, "optimizer"), facts["groups"])
        scaler.load_state_dict(facts["scaler"])
        best = {name: tensor.to(device) for name, tensor in part_of(tensors, "best").items()}
        shelf = [(e, m, part_of(tensors, f"shelf{n}")) for n, (e, m) in enumerate(facts["shelf"])]
        order, loss_sum = tensors["order"], tensors["loss_sum"].to(device)
        restore_random(tensors, facts, generator, device)
        note(f"goes on from a checkpoint: step {at['step']} of {steps}")
        for entry in history:
            on_epoch(int(entry["epoch"]), {k: v for k, v in entry.items() if k != "epoch"})
    else:
        best_metrics = validate(network)
        best = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        history.append({"epoch": 0, **best_metrics})
        on_epoch(0, best_metrics)
        if settings.reset_layers and not scratch:
            made.reset_top(network, settings.reset_layers)
            with torch.no_grad():  # the probe was fitted to what the old layers gave
                for parameter in network.get_submodule(info["head"]).parameters():
                    parameter.zero_()
            if ema:
                ema.set(network)

    def keep_checkpoint() -> None:
        if checkpoints is None:
            return
        tensors: State = {f"network/{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in ema.module.state_dict().items()} if ema else {}
        tensors |= {f"best/{k}": v for k, v in best.items()}
        for n, (_, _, state) in enumerate(shelf):
            tensors |= {f"shelf{n}/{k}": v for k, v in state.items()}
        moments, groups = optimizer_state(optimizer)
        tensors |= {f"optimizer/{k}": v for k, v in moments.items()}
        random_tensors, random_facts = random_state(generator, device)
        tensors |= {"order": order, "loss_sum": loss_sum, **random_tensors}
        at["total_seconds"] = before + time.perf_counter() - began
        facts = {
            "at": at,
            "history": history,
            "best_metrics": best_metrics,
            "learning_rate": todo.learning_rate,
            "execution": list(execution),
            "groups": groups,
            "scaler": scaler.state_dict(),
            "shelf": [(e, m) for e, m, _ in shelf],
            **random_facts,
        }
        try:
            checkpoint.save(checkpoints, int(at["step"]), tensors, facts)
        except OSError as error:  # a full disk costs the checkpoint, not the training
            note(f"no checkpoint could be written ({error.strerror}); training goes on without")

    before, last_saved = at["total_seconds"], time.perf_counter()
    while at["epoch"] <= todo.epochs and not at["stopped"]:
        epoch = int(at["epoch"])
        if todo.strategy == "gradual":
            freeze(network, "gradual", info["head"], frozen_share(epoch, todo.epochs))
        set_training_mode(network, todo.frozen_statistics)
        training(optimizer)
        if not len(order):
            order = epoch_order(examples.targets, classes, todo.balance, generator, examples.weights)
            order = examples.by_length(order, todo.batch_size, generator)
            loss_sum, at["seconds"] = torch.zeros((), device=device), 0.0
        clock = time.perf_counter()
        left = order[at["position"] :]  # none, where the run was stopped before it was validated
        for indices, batch in examples.in_order(left.split(todo.batch_size) if len(left) else ()):
            if not (len(indices) == 1 and not todo.frozen_statistics):  # BatchNorm has no statistics of one example
                set_rates(optimizer, rate_factor(settings, int(at["step"]), steps, history))
                loss_sum = loss_sum + train_step(indices, batch) * len(indices)
                at["step"] += 1
                if ema:
                    ema.update(network, int(at["step"]))
            at["position"] += len(indices)
            progress(int(at["step"]), steps)
            if settings.checkpoint_seconds and time.perf_counter() - last_saved > settings.checkpoint_seconds:
                at["seconds"] += time.perf_counter() - clock
                keep_checkpoint()
                last_saved = clock = time.perf_counter()
        at["seconds"] += time.perf_counter() - clock
        candidate = ema.module if ema else network
        metrics = validate(candidate)
        train_loss = float(loss_sum / len(examples))
        if not math.isfinite(train_loss + metrics["val_loss"]):
            note(f"training diverged in epoch {epoch}: the loss is no number any more; try a smaller learning_rate")
            break
        entry = {
            "train_loss": train_loss,
            **metrics,
            "learning_rate": max(group["lr"] for group in optimizer.param_groups),
            "images_per_second": len(examples) / max(at["seconds"], 1e-9),
        }
        history.append({"epoch": epoch, **entry})
        on_epoch(epoch, entry)
        if settings.soup:
            state = {name: tensor.cpu().clone() for name, tensor in candidate.state_dict().items()}
            shelf.append((epoch, metrics, state))
            shelf = sorted(shelf, key=lambda item: rank(settings.metric, item[1]), reverse=True)[: settings.soup]
        # With no validation images there is nothing to choose by: the last epoch is kept.
        if better(settings.metric, metrics, best_metrics) or not len(val):
            best_metrics, at["best_epoch"] = metrics, epoch
            best = {name: tensor.clone() for name, tensor in candidate.state_dict().items()}
        at |= {"epoch": epoch + 1, "position": 0, "stopped": epoch - at["best_epoch"] >= patience}
        order = order[:0]
        if settings.checkpoint_seconds:
            keep_checkpoint()
            last_saved = time.perf_counter()

    # Averages of weights compete on validation like any epoch.
    averages: dict[str, Any] = {}

    def measure_state(state: State) -> dict[str, float]:
        network.load_state_dict(state)
        return validate(network)

    if settings.soup and len(shelf) > 1 and at["best_epoch"]:
        best, best_metrics, averages["soup"] = greedy_soup(
            [(m, s) for _, m, s in shelf], settings.metric, measure_state
        )
    if settings.wise_ft and at["best_epoch"]:
        on_cpu = {name: tensor.cpu() for name, tensor in best.items()}
        first = {name: tensor.cpu() for name, tensor in start.items()}
        best, best_metrics, averages["wise_ft"] = wise_ft(first, on_cpu, best_metrics, settings.metric, measure_state)
    grafts = made.RECIPE.grafts and settings.lp_ft and not scratch and not settings.reset_layers
    # As in the choice of a candidate: what is ahead by one example of validation and a half, or less, owes it to luck.
    luck = 0.0 if settings.metric == "loss" else 1.5 / max(len(val), 1)
    if grafts and at["best_epoch"] and not settings.wise_ft:
        half = average([(0.5, start), (0.5, best)])
        values = measure_state(half)
        if merit(settings.metric, values) + luck >= merit(
            settings.metric, best_metrics
        ):  # half way back is the safer place
            best, best_metrics, averages["half_way"] = half, values, 0.5
    if grafts and len(val) and merit(settings.metric, best_metrics) <= merit(settings.metric, history[0]) + luck:
        best, averages, at["best_epoch"] = start, {}, 0
        note("no epoch is better on validation than the probe by more than luck: the baseline is kept")
    network.load_state_dict(best)
    logits = val_logits(network)
    final = measure(logits, val.targets.numpy(), METRICS)
    if grafts:
        moved = with_refit_head(best, baseline, info)
        # It has learned from validation: where it does no better there, the layers below have moved too far for what it learned.
        if not at["best_epoch"] or rank(settings.metric, measure_state(moved)) > rank(settings.metric, final):
            best, averages["refit_head"] = moved, True
    seconds = before + time.perf_counter() - began
    return save_model(
        folder,
        {k: v.cpu().numpy() for k, v in best.items()},
        {
            "modality": name_of(info),
            **{k: info[k] for k in ("backbone", "backbone_args", "head", "classes", "preprocess")},
            "augmentation": augmentation,
            "weights": {"source": "random", "sha256": ""} if scratch else info["weights"],
            "candidate": "scratch" if scratch else "fine_tuned",
            "dataset_digest": dataset.digest,
            "seconds": seconds + (0 if scratch else info["seconds"]),  # with those of the probe
            "training_seconds": seconds,
            "selection": {
                "metric": f"val_{settings.metric}",
                "value": final[f"val_{settings.metric}"],
                "examples": len(val),
                "epoch": at["best_epoch"],
                "val": final,
            },
            "temperature": fit_temperature(logits, val.targets.numpy()),
            "averages": averages,
            "plan": planned.params("training"),
            "hyperparameters": {
                **settings.model_dump(),
                **{k: v for k, v in todo._asdict().items() if k in FineTuneSettings.model_fields},
                "batchnorm": "frozen" if todo.frozen_statistics else "trained",
                "flip": "yes" if augmentation.get("flip") else "no",
            },
            "history": history,
        },
        files=preprocess.files(),
    )


# ---- the pieces, in the order of their use -------------------------------------------------------------------------------------


def load_start(network: Any, baseline: Path, info: dict[str, Any], lp_ft: bool) -> None:
    """Load the pretrained weights, and as the head the probe that was fitted on train alone, or zeros.

    That probe has not seen validation, so the validation accuracy of every epoch is honest.
    """
    from safetensors.torch import load_file

    state: State = {k: torch.from_numpy(v) for k, v in read_tensors(baseline, info).items()}
    for name, tensor in load_file(baseline / "probe.safetensors").items():
        state[f"{info['head']}.{name}"] = tensor if lp_ft else torch.zeros_like(tensor)
    network.load_state_dict(state)


def with_refit_head(state: State, baseline: Path, info: dict[str, Any]) -> State:
    """Return ``state`` with what the baseline's head learned from validation added to its own: the final head less the probe's.

    Whatever was judged on validation was judged before; where training changed nothing, this is the baseline itself.
    """
    from safetensors.torch import load_file

    final, moved = read_tensors(baseline, info), dict(state)
    for name, probe in load_file(baseline / "probe.safetensors").items():
        key = f"{info['head']}.{name}"
        moved[key] = state[key] + (torch.from_numpy(final[key]) - probe).to(state[key])
    return moved


def execution_plan(
    network: Any,
    info: dict[str, Any],
    todo: Plan,
    settings: FineTuneSettings,
    examples: Examples,
    preprocess: Preprocess,
    device: torch.device,
) -> Planned:
    """Choose how the network is trained, by timed steps on one batch."""
    set_training_mode(network, todo.frozen_statistics)
    few = torch.arange(min(todo.batch_size, len(examples)))
    total = todo.epochs * len(examples)
    targets, splittable = examples.targets[few], todo.frozen_statistics
    return plan_training(
        network, info["backbone"], examples[few], targets, preprocess, device, total, settings, splittable
    )


def set_training_mode(network: nn.Module, frozen_statistics: bool) -> None:
    """Put the network in training mode, BatchNorm excepted: the statistics of small batches would overwrite those of ImageNet.

    ``requires_grad=False`` does not stop them (pytorch/pytorch#86590); evaluation mode does, and has to be set again after every ``train()``.
    """
    network.train()
    if frozen_statistics:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def make_loss(label_smoothing: float, weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the cross-entropy for class indices (N,), or for mixed targets (N, classes), which are smooth already."""

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dtype == torch.long:
            return F.cross_entropy(logits, targets, weights, label_smoothing=label_smoothing)
        return F.cross_entropy(logits, targets, weights)

    return loss_of


def share_of(part: Tensor, targets: Tensor, weights: Tensor | None) -> Any:
    """Return what the mean loss of ``part`` counts in that of the whole batch: its share of the examples, or of their weights."""
    if weights is None or targets.dtype != torch.long:
        return len(part) / len(targets)
    return weights[part].sum() / weights[targets].sum()


def find_rate(
    network: Any,
    optimizer: Any,
    todo: Plan,
    examples: Examples,
    train_step: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
    note: Callable[[str], None],
) -> float:
    """Return the rate that the range test suggests, with the network as it was before."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    set_training_mode(network, todo.frozen_statistics)
    training(optimizer)

    def step(rate: float) -> float:
        set_rates(optimizer, rate / todo.learning_rate)
        indices = torch.randint(len(examples), (todo.batch_size,), generator=generator)
        return float(train_step(indices, examples[indices]))

    rate, curve = range_test(step)
    if not curve:
        raise UserError(
            "setting rate_test: the very first loss is no number; look at the weights, or set learning_rate"
        )
    network.load_state_dict(before)
    note(f"learning rate {rate:.2g}: by a range test of {len(curve)} steps")
    return rate


def training(optimizer: Any) -> None:
    """Have the weights be those that are trained: the schedule-free optimizer keeps two sets."""
    if hasattr(optimizer, "train"):
        optimizer.train()


def evaluating(optimizer: Any) -> None:
    if hasattr(optimizer, "eval"):
        optimizer.eval()


# ---- what a checkpoint holds ---------------------------------------------------------------------------------------------------


def part_of(tensors: State, prefix: str) -> State:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def optimizer_state(optimizer: Any) -> tuple[State, list[dict[str, Any]]]:
    """Return the optimizer's tensors by "PARAMETER.NAME", and its groups as plain values."""
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, values in state["state"].items()
        for name, value in values.items()
        if value is not None
    }
    return tensors, [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in state["param_groups"]
    ]


def restore_optimizer(optimizer: Any, tensors: State, groups: list[dict[str, Any]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            # Fused kernels walk the memory of a parameter and of its moments side by side: both must be laid out alike.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(generator: torch.Generator, device: torch.device) -> tuple[State, dict[str, Any]]:
    """Return every random state that the next step draws from."""
    tensors = {"random/generator": generator.get_state(), "random/torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return tensors, {"numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss]}


def restore_random(tensors: State, facts: dict[str, Any], generator: torch.Generator, device: torch.device) -> None:
    generator.set_state(tensors["random/generator"])
    torch.set_rng_state(tensors["random/torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    name, keys, position, has_gauss, gauss = facts["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
