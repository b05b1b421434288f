"""Fine-tuning: LP-FT from the baseline's head (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution"), with BatchNorm's statistics frozen, layer-wise rates, an average of the weights, and the best epoch kept."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from graftwork.backbones import build
from graftwork.batches import SplitImages, augment
from graftwork.dataset import Dataset
from graftwork.errors import UserError
from graftwork.images import Preprocess
from graftwork.model import read_info, read_tensors, ready_device, save_model, to_input
from graftwork.settings import FineTuneSettings
from graftwork.strategies import Plan, freeze, plan

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

    The same dataset, baseline and settings give the same weights, bit for bit on CPU.
    """
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    generator = torch.Generator().manual_seed(settings.seed)  # order and augmentation
    device = ready_device()
    info = read_info(baseline)
    preprocess = Preprocess(**info["preprocess"])
    train = SplitImages(dataset, "train", preprocess)
    val = SplitImages(dataset, "val", preprocess)
    todo = plan(settings, len(train), len(dataset.classes))
    for reason in todo.reasons:
        note(reason)

    network = starting_network(baseline, info, todo, len(dataset.classes)).to(device, memory_format=torch.channels_last)
    freeze(network, todo.strategy, info["head"])
    if todo.batch_size < 2 and todo.strategy == "scratch":
        raise UserError(
            "setting batch_size = 1: BatchNorm learns nothing from one example; from scratch, use at least 2"
        )
    steps_per_epoch = math.ceil(len(train) / todo.batch_size)
    total_steps = todo.epochs * steps_per_epoch
    warmup_steps = round(settings.warmup * total_steps)
    optimizer = torch.optim.AdamW(
        param_groups_layer_decay(network, weight_decay=settings.weight_decay, layer_decay=todo.layer_decay),
        lr=todo.learning_rate,
        fused=True,
    )
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(1, total_steps - warmup_steps),
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
        cycle_limit=1,
    )
    ema = (
        ModelEmaV3(network, decay=settings.ema_decay, use_warmup=True, warmup_power=0.75)
        if settings.ema_decay
        else None
    )

    # Epoch 0 is the probe itself: if no epoch beats it, it is what is kept.
    best_accuracy, best_loss = measure(network, val, preprocess, device)
    best_epoch, best_state = 0, copy.deepcopy(network.state_dict())
    history: list[dict[str, float]] = [{"epoch": 0, "val_accuracy": best_accuracy, "val_loss": best_loss}]
    on_epoch(0, {"val_accuracy": best_accuracy, "val_loss": best_loss})

    step = 0
    for epoch in range(1, todo.epochs + 1):
        started, losses = time.perf_counter(), []
        set_training_mode(network, frozen_statistics=todo.strategy != "scratch")
        for indices in torch.randperm(len(train), generator=generator).split(todo.batch_size):
            if len(indices) == 1 and todo.strategy == "scratch":
                continue  # BatchNorm has no statistics of one example
            scheduler.step_update(step)  # sets each group's rate, layer decay included
            pixels = augment(train[indices], settings.flip, settings.shift, generator)
            logits = network(to_input(pixels, preprocess, device))
            loss = F.cross_entropy(logits, train.targets[indices].to(device), label_smoothing=settings.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            if ema:
                ema.update(network, step)
            losses.append(loss.detach())
            progress(step, total_steps)
        seconds = time.perf_counter() - started
        candidate = ema.module if ema else network
        accuracy, val_loss = measure(candidate, val, preprocess, device)
        train_loss = float(torch.stack(losses).mean())
        if not math.isfinite(train_loss + val_loss):
            note(f"training diverged in epoch {epoch}: the loss is no number any more; try a smaller learning_rate")
            break
        metrics = {
            "train_loss": train_loss,
            "val_accuracy": accuracy,
            "val_loss": val_loss,
            "learning_rate": max(group["lr"] for group in optimizer.param_groups),
            "images_per_second": len(train) / seconds,
        }
        history.append({"epoch": epoch, **metrics})
        on_epoch(epoch, metrics)
        # A tie in accuracy, common on a small validation split, goes to the smaller loss.
        if (accuracy, -val_loss) > (best_accuracy, -best_loss):
            best_accuracy, best_loss, best_epoch = accuracy, val_loss, epoch
            best_state = copy.deepcopy(candidate.state_dict())
        if epoch - best_epoch >= settings.patience:
            break

    return save_model(
        folder,
        {k: v.cpu().numpy() for k, v in best_state.items()},
        {
            **{k: info[k] for k in ("backbone", "backbone_args", "head", "classes", "preprocess")},
            "weights": {"source": "random", "sha256": ""} if todo.strategy == "scratch" else info["weights"],
            "candidate": "scratch" if todo.strategy == "scratch" else "fine_tuned",
            "dataset_digest": dataset.digest,
            "seconds": time.perf_counter()
            - began
            + (0 if todo.strategy == "scratch" else info["seconds"]),  # with those of the probe
            "selection": {"metric": "val_accuracy", "value": best_accuracy, "examples": len(val), "epoch": best_epoch},
            "hyperparameters": {
                **settings.model_dump(),
                "strategy": todo.strategy,
                "epochs": todo.epochs,
                "batch_size": todo.batch_size,
                "learning_rate": todo.learning_rate,
                "layer_decay": todo.layer_decay,
            },
            "history": history,
        },
    )


def starting_network(baseline: Path, info: dict[str, Any], todo: Plan, classes: int) -> Any:
    """Return the network that training starts from: random for ``scratch``, else the pretrained one with the probe's head.

    The head is the probe that was fitted on train alone, so that the validation accuracy of every epoch is honest.
    """
    network = build(info["backbone"], info["backbone_args"], classes)
    if todo.strategy == "scratch":
        return network
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {k: torch.from_numpy(v) for k, v in read_tensors(baseline, info).items()}
    for name, tensor in load_file(baseline / "probe.safetensors").items():
        state[f"{info['head']}.{name}"] = tensor
    network.load_state_dict(state)
    return network


def set_training_mode(network: nn.Module, frozen_statistics: bool) -> None:
    """Put the network in training mode, BatchNorm excepted: the statistics of small batches would overwrite those of ImageNet.

    ``requires_grad=False`` does not stop them (pytorch/pytorch#86590); evaluation mode does, and has to be set again after every ``train()``.
    """
    network.train()
    if frozen_statistics:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@torch.inference_mode()
def measure(
    network: nn.Module, images: SplitImages, preprocess: Preprocess, device: torch.device, batch_size: int = 128
) -> tuple[float, float]:
    """Return (accuracy, mean cross-entropy) on a split; (0, 0) where it is empty. Leaves the network in evaluation mode."""
    network.eval()
    correct, loss = 0, 0.0
    for indices in torch.arange(len(images)).split(batch_size):
        logits = network(to_input(images[indices], preprocess, device)).float()
        targets = images.targets[indices].to(device)
        correct += int((logits.argmax(1) == targets).sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
    return correct / max(len(images), 1), loss / max(len(images), 1)
