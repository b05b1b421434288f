"""The execution plan: how one network is run on one machine, in one phase, found by a few timed steps.

Memory format, precision, engine, micro-batch and threads change the speed several times over and the result hardly, and the best
choice differs by network, by phase and by machine. A candidate is taken only if its results equal those of the plain network within
a tolerance. What was measured is kept (``~/.cache/graftwork/execution.json``), so that the next run neither pays for it nor, by the
noise of a clock, runs the network in another way.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from graftwork.errors import UserError, one_line
from graftwork.files import write_json
from graftwork.modality import Preprocess
from graftwork.parallel import cores
from graftwork.settings import ExecutionSettings

# Of the difference's norm, as a share of the result's. Gradients are coarser than outputs: rounding moves a unit across its kink.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
GRADIENT_TOLERANCE = {"fp32": 0.03, "bf16": 0.2, "fp16": 0.2}
GAIN = 1.05  # a candidate must be faster than this many times the incumbent: less is noise
QUIET = 0.2  # of the cores' time that other processes may take during a trial of threads: more, and it tells of them
FEW = 256  # examples that are over before the first trial would be
BUDGET_SHARE = 0.15  # of the phase's estimated seconds, up to the setting ``plan_seconds``
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Seconds that preparing an engine costs, before it was ever measured: read off two cores with EfficientNet-Lite0.
PREPARATION = {"eager": 0.0, "traced": 1.5, "compiled": 100.0}


class Execution(NamedTuple):
    """How a network is run."""

    memory_format: str  # "channels_last" or "contiguous"
    precision: str  # "fp32", "bf16" or "fp16"
    engine: str  # "eager", "traced" (frozen and fused; inference alone) or "compiled"
    micro_batch: int  # examples that pass through the network at once
    threads: int  # of the CPU; 0 elsewhere

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.precision} {self.memory_format} {self.engine}, {self.micro_batch} at once{threads}"


class Planned(NamedTuple):
    """A chosen execution and what is known of it."""

    execution: Execution
    images_per_second: float  # 0 where nothing was timed
    plain_images_per_second: float  # of fp32, contiguous, eager; 0 where nothing was timed
    seconds: float  # that planning took
    rejected: dict[str, str]  # candidate: reason

    def __str__(self) -> str:
        if not self.images_per_second:
            return f"{self.execution} (not timed)"
        gain = self.images_per_second / self.plain_images_per_second if self.plain_images_per_second else 1.0
        return f"{self.execution}: {self.images_per_second:.0f} images/s, {gain:.1f} times the plain network"

    def params(self, phase: str) -> dict[str, Any]:
        """Return what is logged to MLflow."""
        values: dict[str, Any] = dict(self.execution._asdict())
        values |= {"images_per_second": round(self.images_per_second, 1)}
        values |= {"plain_images_per_second": round(self.plain_images_per_second, 1)}
        return {f"plan_{phase}_{k}": v for k, v in values.items()}


Time = Callable[[Execution, int], float]  # seconds of one pass over that many images
Check = Callable[[Execution], float]  # relative difference from the plain network


def default_execution(
    settings: ExecutionSettings, device: torch.device, preprocess: Preprocess, batch: int = 0
) -> Execution:
    """Return the execution that is right where nothing may be timed: fp32, eager, the usual memory format; the settings decide first."""
    options = preprocess.options(device.type)
    if settings.engine not in ("auto", *options["engine"]):
        raise UserError(
            f"setting engine = {settings.engine}: is not for such examples on {device.type}; use {' or '.join(options['engine'])}"
        )
    return Execution(
        settings.memory_format if settings.memory_format != "auto" else options["memory_format"][0],
        settings.precision if settings.precision != "auto" else "fp32",
        settings.engine if settings.engine != "auto" else "eager",
        settings.micro_batch or batch or preprocess.at_once[device.type],
        (settings.threads or cores()) if device.type == "cpu" else 0,
    )


# ---- inference -----------------------------------------------------------------------------------------------------------------


class Inference:
    """Runs ``module`` in evaluation mode, by a plan: a batch as ``preprocess.stack`` makes it in, float32 (N, ...) on the CPU out.

    Where examples are of different lengths, those of like length pass together, so that little is computed for what only fills up.
    """

    def __init__(
        self, module: nn.Module, preprocess: Preprocess, device: torch.device, execution: Execution, note: Any = None
    ) -> None:
        self.module, self.preprocess, self.device = module.eval(), preprocess, device
        self.note = note or (lambda message: None)
        self.execution = execution
        # Not in inference mode: parameters that are converted there could not be trained any more.
        self.module.to(memory_format=memory_format(execution))
        self._prepared: Callable[[Tensor], Tensor] | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        lengths = self.preprocess.lengths(batch)
        if lengths is None:
            return self._in_order(batch)
        order = lengths.argsort(descending=True, stable=True)
        found = self._in_order(batch[order])
        return torch.empty_like(found).index_copy_(0, order, found) if len(found) else found

    def _in_order(self, batch: Tensor) -> Tensor:
        found, position = [], 0
        while position < len(batch):
            part = batch[position : position + self.execution.micro_batch]
            with contextlib.suppress(torch.OutOfMemoryError):
                found.append(self._run(part))
                position += len(part)
                continue
            self.execution = halve(self.execution, self.device, self.note)
            self._prepared = None
        return torch.cat(found) if found else torch.zeros(0)

    @torch.inference_mode()
    def _run(self, part: Tensor) -> Tensor:
        count, execution = len(part), self.execution
        if execution.engine != "eager" and count < execution.micro_batch:
            # An engine that was made for one shape is made anew for every other; the last, shorter batch is filled up.
            part = torch.cat([part, part.new_zeros(execution.micro_batch - count, *part.shape[1:])])
        x = laid_out(self.preprocess.to_input(part, self.device), execution)
        with precision_of(execution, self.device):
            if self._prepared is None:
                self._prepared = prepare(self.module, x, execution)
            return self._prepared(x)[:count].float().cpu()


def prepare(module: nn.Module, example: Tensor, execution: Execution) -> Callable[[Tensor], Tensor]:
    """Return ``module``, whose memory format is set already, as ``execution`` wants it, for inputs like ``example``."""
    if execution.engine == "traced":
        with warnings.catch_warnings(action="ignore"):  # tracing warns of every Python number that it makes a constant
            # oneDNN's graph compiler fuses convolution, BatchNorm and activation; a frozen graph has its constants folded.
            torch.jit.enable_onednn_fusion(True)
            traced = torch.jit.freeze(torch.jit.trace(module, example, check_trace=False).eval())
            for _ in range(2):  # the first two runs look at the shapes and make the fused kernels
                traced(example)
        return traced
    if execution.engine == "compiled":
        compiled = torch.compile(module, options={"freezing": True} if example.device.type == "cpu" else {})
        compiled(example)
        return compiled
    return module


def plan_inference(
    module: nn.Module,
    name: str,
    sample: Tensor,
    preprocess: Preprocess,
    device: torch.device,
    examples: int,
    settings: ExecutionSettings,
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16"),
) -> Planned:
    """Choose how ``module`` is run over ``examples`` examples; ``sample`` is a batch of some of them."""
    module.eval()
    start = default_execution(settings, device, preprocess)
    if not len(sample) or not examples:
        return Planned(start, 0.0, 0.0, 0.0, {})
    start = start._replace(micro_batch=min(start.micro_batch, 2 ** math.ceil(math.log2(max(1, examples)))))
    ready: dict[Execution, Inference] = {}

    def run(execution: Execution, count: int) -> Tensor:
        if execution not in ready:
            if len(ready) > 4:  # a traced graph has weights of its own: those of old candidates go
                del ready[next(e for e in ready if e != start)]
            ready[execution] = Inference(module, preprocess, device, execution)
        if execution.engine != "traced":  # a traced graph has weights of its own
            module.to(memory_format=memory_format(execution))
        set_threads(execution)
        return ready[execution](repeated(sample, count))

    def timed(execution: Execution, count: int) -> float:
        began = time.perf_counter()
        run(execution, count)
        synchronize(device)
        return time.perf_counter() - began

    reference: list[Tensor] = []

    def difference(execution: Execution) -> float:
        few = min(8, len(sample))
        if not reference:
            reference.append(run(plain(execution), few))
        return relative_difference(run(execution, few), reference[0])

    worth_it = preprocess.options(device.type)
    options = {
        "engine": worth_it["engine"],
        "precision": [p for p in precisions if supported(p, device)],
        "memory_format": worth_it["memory_format"],
        "micro_batch": [start.micro_batch, start.micro_batch * 2, start.micro_batch // 2],
        "threads": thread_options(start),
    }
    name = f"inference {name}"
    return search(name, device, preprocess.shape_key, start, options, settings, examples, timed, difference, TOLERANCE)


# ---- training ------------------------------------------------------------------------------------------------------------------


def plan_training(
    network: nn.Module,
    name: str,
    sample: Tensor,
    targets: Tensor,
    preprocess: Preprocess,
    device: torch.device,
    examples: int,
    settings: ExecutionSettings,
    splittable: bool,
) -> Planned:
    """Choose how ``network`` is trained over ``examples`` examples in all; ``sample`` is one batch.

    A copy is run forward and backward; the network and the random state are left as they were. ``splittable`` says that a batch may
    pass in parts: not where BatchNorm learns from it.
    """
    start = default_execution(settings, device, preprocess, len(sample))
    if not splittable:
        start = start._replace(micro_batch=len(sample))
    if start.engine == "traced":  # a frozen graph learns nothing
        start = start._replace(engine="eager")
    if not settings.plan_seconds or examples < FEW:
        return Planned(start, 0.0, 0.0, 0.0, {})
    trial = copy.deepcopy(network)
    ready: dict[str, Any] = {"eager": trial}

    def step(execution: Execution, count: int) -> None:
        trial.to(memory_format=memory_format(execution))
        set_threads(execution)
        if execution.engine not in ready:
            ready[execution.engine] = torch.compile(trial)
        trial.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # dropout must draw the same in every candidate
        labels = repeated(targets, count).to(device)
        parts = repeated(sample, count).split(execution.micro_batch)
        for part, wanted in zip(parts, labels.split(execution.micro_batch), strict=True):
            logits = forward(ready[execution.engine], preprocess.to_input(part, device), execution, device)
            (nn.functional.cross_entropy(logits, wanted) * (len(part) / count)).backward()

    def timed(execution: Execution, count: int) -> float:
        began = time.perf_counter()
        step(execution, count)
        synchronize(device)
        return time.perf_counter() - began

    def gradient() -> Tensor:
        return torch.cat([p.grad.float().flatten().cpu() for p in trial.parameters() if p.grad is not None])

    reference: list[Tensor] = []
    rounding: list[float] = []

    def difference(execution: Execution) -> float:
        """Return the difference beyond the plain network's own: BatchNorm and ReLU make much of the last bit in some networks."""
        few = min(8, len(sample))
        if not reference:
            usual = plain(execution)._replace(micro_batch=few)
            step(usual, few)
            reference.append(gradient())
            weights = [p.detach().clone() for p in trial.parameters()]
            move_by_one_bit(trial)
            step(usual, few)
            rounding.append(relative_difference(gradient(), reference[0]))
            with torch.no_grad():
                for parameter, before in zip(trial.parameters(), weights, strict=True):
                    parameter.copy_(before)
        step(execution, few)
        return max(0.0, relative_difference(gradient(), reference[0]) - 3 * rounding[0])

    worth_it = preprocess.options(device.type)
    options = {
        "precision": [p for p in ("fp32", "bf16", "fp16") if supported(p, device)],
        "memory_format": worth_it["memory_format"],
        "micro_batch": [start.micro_batch] + ([start.micro_batch // 2] if splittable and start.micro_batch > 8 else []),
        "threads": thread_options(start),
        "engine": [engine for engine in worth_it["engine"] if engine != "traced"],
    }
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trained = sum(p.requires_grad for p in network.parameters())
        name = f"training {name}, {trained} tensors, batch {len(sample)}"
        tolerance = GRADIENT_TOLERANCE
        return search(
            name, device, preprocess.shape_key, start, options, settings, examples, timed, difference, tolerance
        )


def repeated(batch: Tensor, count: int) -> Tensor:
    """Return ``count`` examples, those of ``batch`` over and over."""
    return batch.repeat(math.ceil(count / len(batch)), *[1] * (batch.dim() - 1))[:count]


@torch.no_grad()
def move_by_one_bit(network: nn.Module) -> None:
    """Move every parameter to the next number, up or down at random."""
    for parameter in network.parameters():
        up = torch.rand(parameter.shape, device="cpu").to(parameter.device) < 0.5
        parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf).to(parameter)))


def forward(network: Any, x: Tensor, execution: Execution, device: torch.device) -> Tensor:
    """Return the logits of ``x``, float32, with the precision and the memory format of ``execution``."""
    with precision_of(execution, device):
        return network(laid_out(x, execution)).float()


def halve(execution: Execution, device: torch.device, note: Callable[[str], None]) -> Execution:
    """Return ``execution`` with half the micro-batch, after the device's memory ran out.

    Raises:
        UserError: a single example was too much already.
    """
    if execution.micro_batch <= 1:
        raise UserError(
            "out of memory with a single example at once; use shorter or smaller examples (image_size, max_length), or a smaller backbone"
        ) from None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = execution._replace(micro_batch=execution.micro_batch // 2)
    note(f"out of memory: {smaller.micro_batch} examples at once from here on; the batch size stays as it is")
    return smaller


# ---- the search ----------------------------------------------------------------------------------------------------------------


def search(
    phase: str,
    device: torch.device,
    shape: str,
    start: Execution,
    options: dict[str, Any],
    settings: ExecutionSettings,
    examples: int,
    timed: Time,
    difference: Check,
    tolerance: dict[str, float],
) -> Planned:
    """Improve ``start`` one dimension after the other, as long as the budget lasts, and return the best.

    The budget is ``BUDGET_SHARE`` of what the phase would take with ``start``, and at most ``plan_seconds``; for fewer than
    ``FEW`` examples nothing is timed.
    """
    began = time.perf_counter()
    set_threads(start)
    if not settings.plan_seconds or examples < FEW:
        return Planned(start, 0.0, 0.0, 0.0, {})
    fallback = plain(start, settings)
    key = hashlib.sha256(f"{machine(device)}|{phase}|{shape}|{start}|{fallback}".encode()).hexdigest()[:24]
    kept = read_measured(key)
    rates: dict[str, float] = dict(kept.get("rates", {}))  # images a second
    costs: dict[str, float] = dict(kept.get("costs", {}))  # seconds of preparation
    rejected: dict[str, str] = dict(kept.get("rejected", {}))
    skipped: dict[str, float] = dict(kept.get("skipped", {}))  # the budget that was too small
    busy: dict[str, str] = {}  # not kept: the next run judges
    best = start
    try:
        if not rates:
            try_start(timed, difference, start, fallback, tolerance, rates, rejected)
        best = start if str(start) in rates else fallback
        if str(best) not in rates:  # a cache that somebody edited
            first_guess(timed, difference, best, best, tolerance, rates, rejected)
        count = trial_size(rates[str(best)], start)
        budget = min(settings.plan_seconds, BUDGET_SHARE * examples / rates[str(best)])
        for dimension, choices in options.items():
            if getattr(settings, dimension) not in ("auto", 0):
                continue
            for choice in choices:
                candidate = best._replace(**{dimension: choice})
                name = str(candidate)
                if name not in rates and name not in rejected:
                    cost = 4 * count / rates[str(best)] + PREPARATION[candidate.engine]
                    # What did not fit is tried again only when there is clearly more time: the next run shall run as this one did.
                    if time.perf_counter() - began + cost > budget or budget < 2 * skipped.get(name, 0.0):
                        skipped[name] = max(budget, skipped.get(name, 0.0))
                        continue
                    before = processor_seconds()
                    try_one(candidate, best, count, timed, difference, tolerance, rates, costs, rejected)
                    skipped.pop(name, None)
                    if dimension == "threads" and name in rates and others_share(before) > QUIET:
                        # While others compute, fewer threads seem the better choice. They are not, when the others have ended.
                        busy[name] = "not judged: other processes were using the cores"
                        del rates[name]
                if name in rates and worth(candidate, best, rates, costs, examples):
                    best = candidate
    except torch.OutOfMemoryError:
        # Too large to be tried at all: what runs the phase halves the micro-batch by itself.
        return Planned(start, 0.0, 0.0, time.perf_counter() - began, rejected)
    entry = {"phase": phase, "machine": machine(device), "rates": rates, "costs": costs}
    entry |= {"rejected": rejected, "skipped": skipped}
    if entry != kept:
        keep_measured(key, entry)
    set_threads(best)
    reasons = (
        rejected | busy | {name: f"not tried within a budget of {seconds:.0f} s" for name, seconds in skipped.items()}
    )
    return Planned(best, rates[str(best)], rates["plain"], time.perf_counter() - began, reasons)


def try_start(timed: Time, difference: Check, start: Execution, *rest: Any) -> None:
    """Time ``start``; an engine or a precision that was asked for and cannot be had is the user's to change."""
    try:
        first_guess(timed, difference, start, *rest)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"{start}: cannot be run here ({one_line(f'{type(error).__name__}: {error}', 150)}); choose another engine or precision"
        ) from None


def first_guess(
    timed: Time,
    difference: Check,
    start: Execution,
    fallback: Execution,
    tolerance: dict[str, float],
    rates: dict[str, float],
    rejected: dict[str, str],
) -> None:
    """Time ``start`` and the plain network on a few images; also the default has to give what the plain network gives.

    Where it does not, ``fallback`` is timed: plain, but for what the settings ask for.
    """
    few = min(8, start.micro_batch)
    off = difference(start)
    usual = timed(start, few)
    rates["plain"] = few / min(timed(plain(start), few) for _ in range(2))
    if not off <= tolerance[start.precision] and start != fallback:
        rejected[str(start)] = f"its results differ by {off:.2g}, more than {tolerance[start.precision]}"
        start = fallback
    count = trial_size(few / usual, start)
    rates[str(start)] = count / min(timed(start, count) for _ in range(2))


def trial_size(rate: float, start: Execution) -> int:
    """Return the images of one trial: one micro-batch, or a tenth of a second's worth of them where the device is fast."""
    return max(start.micro_batch, min(8 * start.micro_batch, 2 ** round(math.log2(max(rate * 0.1, 1)))))


def try_one(
    candidate: Execution,
    best: Execution,
    count: int,
    timed: Time,
    difference: Check,
    tolerance: dict[str, float],
    rates: dict[str, float],
    costs: dict[str, float],
    rejected: dict[str, str],
) -> None:
    """Time ``candidate`` in turns with ``best``, since machines are noisy, and write down its rate or why it is rejected."""
    name = str(candidate)
    if candidate.engine == "compiled":  # its compiler warns of GPUs that nobody asked for
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        began = time.perf_counter()
        if candidate.precision != best.precision:
            # A precision that the processor lacks is up to twenty times slower: one image tells, before any engine is made for it.
            eager, other_eager = candidate._replace(engine="eager"), best._replace(engine="eager")
            slower = timed(eager, 1) / min(timed(other_eager, 1) for _ in range(2))
            if slower > 5:
                rejected[name] = f"{slower:.0f} times slower than {best.precision} on one image"
                return
        off = difference(candidate)
        if not off <= tolerance[candidate.precision]:
            rejected[name] = f"its results differ by {off:.2g}, more than {tolerance[candidate.precision]}"
            return
        timed(candidate, count)
        costs[name] = time.perf_counter() - began if candidate.engine != "eager" else 0.0
        mine, other = [], []
        for _ in range(2):
            mine.append(timed(candidate, count))
            other.append(timed(best, count))
            if mine[0] > 1.25 * other[0]:  # no second look at a clear loser
                break
        rates[name] = rates[str(best)] * min(other) / min(mine)
    except torch.OutOfMemoryError:
        rejected[name] = "out of memory"
    except Exception as error:  # an engine that this network, compiler or device does not take: there are others
        rejected[name] = one_line(f"{type(error).__name__}: {error}", 200)


def worth(
    candidate: Execution, best: Execution, rates: dict[str, float], costs: dict[str, float], examples: int
) -> bool:
    """Tell whether ``candidate`` ends the phase earlier than ``best``, its preparation counted."""
    mine = costs.get(str(candidate), 0.0) + examples / rates[str(candidate)]
    return GAIN * mine < costs.get(str(best), 0.0) + examples / rates[str(best)]


def read_measured(key: str) -> dict[str, Any]:
    """Return what was measured before; nothing where the entry is damaged: it is only a few seconds' worth."""
    kept = read_all_measured().get(key)
    if not isinstance(kept, dict) or not all(
        isinstance(kept.get(part), dict) for part in ("rates", "costs", "rejected", "skipped")
    ):
        return {}
    numbers = [*kept["rates"].values(), *kept["costs"].values(), *kept["skipped"].values()]
    whole = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
    return kept if whole and "plain" in kept["rates"] and all(n > 0 for n in kept["rates"].values()) else {}


def read_all_measured() -> dict[str, Any]:
    try:
        found = json.loads(measured_file().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def keep_measured(key: str, entry: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a home that cannot be written costs a few seconds the next time
        write_json(measured_file(), read_all_measured() | {key: entry})


def measured_file() -> Path:
    cache = os.environ.get("GRAFTWORK_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "graftwork" / "execution.json"


def processor_seconds() -> tuple[float, float, float]:
    """Return the time, the seconds that this machine's cores were busy, and those of them that were this process's."""
    whole, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = whole.idle + getattr(whole, "iowait", 0.0)
    return time.perf_counter(), sum(whole[:8]) - idle, own.user + own.system


def others_share(before: tuple[float, float, float]) -> float:
    """Return the share of the cores' time since ``before`` that other processes used, or the host took for other machines."""
    wall, used, own = (now - then for now, then in zip(processor_seconds(), before, strict=True))
    return max(0.0, used - own) / max(1e-3, wall * (psutil.cpu_count() or 1))


def machine(device: torch.device) -> str:
    """Name what the measured speeds depend on, the network excepted."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{device.type} {name}, {cores()} cores, torch {torch.__version__}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- small helpers -------------------------------------------------------------------------------------------------------------


def plain(execution: Execution, settings: ExecutionSettings | None = None) -> Execution:
    """Return what a plain script does: fp32, contiguous, eager; where ``settings`` ask for something else, that."""
    usual: dict[str, Any] = {"memory_format": "contiguous", "precision": "fp32", "engine": "eager"}
    given = {k for k in usual if settings and getattr(settings, k) != "auto"}
    return execution._replace(**{k: v for k, v in usual.items() if k not in given})


def memory_format(execution: Execution) -> torch.memory_format:
    return torch.channels_last if execution.memory_format == "channels_last" else torch.contiguous_format


def laid_out(x: Tensor, execution: Execution) -> Tensor:
    return x.contiguous(memory_format=memory_format(execution)) if x.dim() == 4 else x


def precision_of(execution: Execution, device: torch.device) -> Any:
    """Return the autocast context of ``execution``. Its weight cache would hold a traced graph's constants, and is off there."""
    return torch.autocast(
        device.type,
        dtype=DTYPES.get(execution.precision, torch.bfloat16),
        enabled=execution.precision in DTYPES,
        cache_enabled=execution.engine == "eager",
    )


def supported(precision: str, device: torch.device) -> bool:
    """Tell whether ``precision`` is worth a trial: fp16 has fast kernels on GPUs alone, bf16 on some of them."""
    if precision == "fp32":
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported()
    return precision == ("bf16" if device.type == "cpu" else "fp16")


def thread_options(start: Execution) -> list[int]:
    return [start.threads] + ([start.threads // 2] if start.threads > 1 else [])


def set_threads(execution: Execution) -> None:
    if execution.threads and torch.get_num_threads() != execution.threads:
        torch.set_num_threads(execution.threads)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference as a share of the reference's norm; infinite where a result is no number."""
    off = float((found - reference).norm() / reference.norm().clamp_min(1e-12))
    return off if math.isfinite(off) else math.inf
