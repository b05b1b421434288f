"""The execution plan: faster where it can be, never another result, and the same plan the next time."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch import Tensor, nn

from graftwork import execution
from graftwork.errors import UserError
from graftwork.execution import (
    Execution,
    Inference,
    cores,
    default_execution,
    measured_file,
    plain,
    plan_inference,
    plan_training,
    relative_difference,
)
from graftwork.images import Preprocess
from graftwork.settings import ExecutionSettings

CPU = torch.device("cpu")
PREPROCESS = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
MANY = 10**9  # examples: the budget is then the setting's
IMAGES = torch.randint(0, 256, (16, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """What one test measures must not decide another; nor does torch.compile's half minute fit in here."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """A small network whose plain run takes ``pause`` seconds, and which calls ``odd`` in every forward pass."""

    def __init__(self, pause: float = 0.0, odd=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.pause, self.odd = pause, odd or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.pause)
        return self.odd(self.head(self.norm(self.conv(x)).relu().mean((2, 3))))


def settings(**given) -> ExecutionSettings:
    """A budget that holds every trial but torch.compile's, and no choice but what the test is about."""
    fixed = {"memory_format": "contiguous", "precision": "fp32", "engine": "eager", "micro_batch": 16, "threads": 1}
    return ExecutionSettings(**({"plan_seconds": 20} | fixed | given))


def plan(network: nn.Module, chosen: ExecutionSettings, examples: int = MANY, name: str = "net"):
    return plan_inference(network, name, IMAGES, PREPROCESS, CPU, examples, chosen)


def train_plan(network: nn.Module, chosen: ExecutionSettings, splittable: bool = True, name: str = "net"):
    targets = torch.arange(len(IMAGES)) % 3
    return plan_training(network, name, IMAGES, targets, PREPROCESS, CPU, MANY, chosen, splittable)


def outputs(network: nn.Module, how: Execution) -> Tensor:
    return Inference(network, PREPROCESS, CPU, how)(IMAGES)


def test_a_faster_engine_is_taken_and_gives_the_same() -> None:
    """Her run would take several times as long as it has to."""
    network = Net(pause=0.005)  # a traced graph does not sleep: it is some ten times faster
    found = plan(network, settings(engine="auto"))
    assert found.execution.engine == "traced"
    assert found.images_per_second > 2 * found.plain_images_per_second > 0
    assert "times the plain network" in str(found)
    expected = outputs(network, plain(found.execution))
    assert relative_difference(outputs(network, found.execution), expected) < 1e-3


def test_an_engine_with_other_results_is_refused_however_fast() -> None:
    """A fused graph that computes something else would give her another model than the one that was evaluated."""
    network = Net(pause=0.005, odd=lambda y: y * 1.01 if torch.jit.is_tracing() else y)
    found = plan(network, settings(engine="auto"))
    assert found.execution.engine == "eager"
    reasons = [why for name, why in found.rejected.items() if "traced" in name]
    assert reasons and all("its results differ by 0.01" in why for why in reasons)


def test_a_precision_with_other_results_is_refused() -> None:
    """bf16 that overflows, on one layer of her network, would cost her accuracy for speed that she did not ask for."""
    lossy = Net(odd=lambda y: y * (2.0 if torch.is_autocast_enabled("cpu") else 1.0))
    found = plan(lossy, settings(precision="auto"))
    assert found.execution.precision == "fp32"
    not_a_number = Net(odd=lambda y: y * (float("nan") if torch.is_autocast_enabled("cpu") else 1.0))
    found = plan(not_a_number, settings(precision="auto"), name="nan")
    assert found.execution.precision == "fp32" and any("bf16" in name for name in found.rejected)
    found = train_plan(lossy, settings(precision="auto"))
    assert found.execution.precision == "fp32" and any("bf16" in name for name in found.rejected)


def test_a_slow_candidate_is_not_taken() -> None:
    """A plan that makes a run slower is worse than none: bf16 is emulated on many processors."""

    def odd(y: Tensor) -> Tensor:
        time.sleep(0.1 if torch.is_autocast_enabled("cpu") else 0.002)
        return y

    found = plan(Net(odd=odd), settings(precision="auto"))
    assert found.execution.precision == "fp32"
    assert any("times slower than fp32 on one image" in why for why in found.rejected.values())


def test_a_faster_precision_is_taken() -> None:
    """The check that refuses a precision must not refuse every one of them."""

    def odd(y: Tensor) -> Tensor:
        time.sleep(0.0 if torch.is_autocast_enabled("cpu") else 0.02)
        return y

    assert plan(Net(odd=odd), settings(precision="auto")).execution.precision == "bf16"
    assert train_plan(Net(odd=odd), settings(precision="auto")).execution.precision == "bf16"


def test_an_engine_that_fails_is_passed_over() -> None:
    """A compiler that is missing on her machine, or does not take her network, would end a run that can do without it."""

    def odd(y: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("unsupported operator\nin a graph")
        return y

    found = plan(Net(pause=0.003, odd=odd), settings(engine="auto"))
    assert found.execution.engine == "eager"
    reason = next(why for name, why in found.rejected.items() if "traced" in name)
    assert "RuntimeError: unsupported operator" in reason and "\n" not in reason


def test_the_second_plan_is_the_first_and_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the noise of a clock, the next run would compute in another way, and its weights differ in the last bit."""
    monkeypatch.setattr(execution, "others_share", lambda before: 0.0)  # the other tests, say
    chosen, calls = settings(engine="auto", precision="auto", memory_format="auto", threads=0), []
    first = plan(Net(pause=0.002), chosen)
    assert measured_file().exists() and first.seconds > 0
    second = plan(Net(pause=0.002, odd=lambda y: calls.append(1) or y), chosen)
    assert not calls, "the network was not run at all"
    assert second._replace(seconds=0) == first._replace(seconds=0)

    first = train_plan(Net(pause=0.002), chosen)
    second = train_plan(Net(pause=0.002, odd=lambda y: calls.append(1) or y), chosen)
    assert not calls and second._replace(seconds=0) == first._replace(seconds=0)
    plan(Net(odd=lambda y: calls.append(1) or y), chosen, name="another network")
    assert calls, "what was measured of one network says nothing of another"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_a_damaged_cache_is_measured_anew(content: str) -> None:
    """A file in her cache, cut off by a full disk, would end every run from then on."""
    measured_file().parent.mkdir(parents=True)
    measured_file().write_text(content)
    assert plan(Net(), settings()).images_per_second > 0
    assert len(json.loads(measured_file().read_text())) == (2 if "format" in content else 1)


def test_a_cache_that_cannot_be_written_costs_seconds_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with a read-only home, no run would start."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "file"))
    assert plan(Net(), settings()).images_per_second > 0


def test_planning_leaves_the_network_and_the_random_state() -> None:
    """Trial steps that moved BatchNorm's statistics, or drew from the seed, would change every result by being timed or not."""
    network = Net(odd=nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train_plan(network, settings(precision="auto", memory_format="auto", threads=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    plan(network, settings(precision="auto", engine="auto", memory_format="auto", threads=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "bf16"), ("precision", "fp32"), ("memory_format", "contiguous"), ("memory_format", "channels_last"),
        ("engine", "eager"), ("engine", "traced"), ("micro_batch", 4), ("micro_batch", 64), ("threads", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seconds", [0, 20])
def test_what_she_sets_is_what_runs(name: str, value: object, seconds: int) -> None:
    """A setting that the plan overrides is none."""
    auto = {"memory_format": "auto", "precision": "auto", "micro_batch": 16, "threads": 0, "engine": "eager"}
    chosen = ExecutionSettings(**(auto | {name: value, "plan_seconds": seconds}))
    assert getattr(plan(Net(), chosen).execution, name) == value
    wanted = "eager" if value == "traced" else value  # which is for inference alone
    assert getattr(train_plan(Net(), chosen).execution, name) == wanted


def test_a_precision_that_she_sets_is_kept_though_it_is_coarse() -> None:
    """She asked for bf16 and knows why; in fp32 it may not even fit."""
    coarse = Net(odd=lambda y: y * (1.2 if torch.is_autocast_enabled("cpu") else 1.0))
    assert plan(coarse, settings(precision="bf16")).execution.precision == "bf16"
    found = plan(coarse, settings(precision="bf16", memory_format="auto"), name="a second")
    assert (found.execution.precision, found.execution.memory_format) == ("bf16", "contiguous"), (
        "the rest is the plain one's"
    )
    assert plan(coarse, settings(precision="auto")).execution.precision == "fp32"
    assert plan(coarse, settings(precision="bf16")).execution.precision == "bf16", "whatever was measured before"


def test_a_budget_of_nothing_times_nothing() -> None:
    """plan_seconds=0 is for whoever wants the same run on every machine."""
    calls: list[int] = []
    found = plan(Net(odd=lambda y: calls.append(1) or y), ExecutionSettings(plan_seconds=0))
    assert not calls and not measured_file().exists()
    assert found.execution == default_execution(ExecutionSettings(), CPU, PREPROCESS)._replace(
        micro_batch=found.execution.micro_batch
    )
    assert found.images_per_second == 0 and "not timed" in str(found)
    train_plan(Net(odd=lambda y: calls.append(1) or y), ExecutionSettings(plan_seconds=0))
    assert not calls and not measured_file().exists()


def test_a_small_job_is_not_planned_at_length() -> None:
    """Planning that takes longer than the work would slow every small run down."""
    network, auto = Net(pause=0.01), settings(engine="auto", precision="auto", memory_format="auto", threads=0)
    began = time.perf_counter()
    found = plan(network, auto, examples=300)
    assert time.perf_counter() - began < 1.0
    assert found.execution.engine == "eager" and any("not tried within a budget" in w for w in found.rejected.values())
    assert plan(network, auto, examples=300)._replace(seconds=0) == found._replace(seconds=0)
    assert plan(network, auto, examples=MANY).execution.engine == "traced", "with more work, it is worth it"
    assert plan(network, auto, examples=16, name="other").images_per_second == 0, "a few images are not worth a trial"


def test_an_unsplittable_batch_stays_whole() -> None:
    """BatchNorm would learn its statistics from parts of a batch, which are worse."""
    assert train_plan(Net(), settings(micro_batch=4), splittable=False).execution.micro_batch == 16
    assert train_plan(Net(), settings(micro_batch=0), splittable=False).execution.micro_batch == 16
    assert train_plan(Net(), settings(micro_batch=4), splittable=True).execution.micro_batch == 4


def test_nothing_to_run_needs_no_plan() -> None:
    """A dataset without validation images would end the run."""
    assert plan_inference(Net(), "n", IMAGES[:0], PREPROCESS, CPU, 0, settings()).images_per_second == 0
    assert len(Inference(Net(), PREPROCESS, CPU, plain(Execution("", "", "", 4, 0)))(IMAGES[:0])) == 0


def test_cores_are_those_that_the_process_may_use() -> None:
    """In a pod with one core of 64, 64 threads would wait for each other."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
        assert default_execution(ExecutionSettings(), CPU, PREPROCESS).threads == 1
        assert default_execution(ExecutionSettings(threads=3), CPU, PREPROCESS).threads == 3
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= cores() <= len(allowed)


def test_threads_are_not_judged_while_others_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned once beside a compiler, every later run on the quiet machine would leave half its cores idle."""

    def odd(y: Tensor) -> Tensor:
        time.sleep(0.05 if torch.get_num_threads() > 1 else 0.01)
        return y

    chosen = settings(threads=0)
    monkeypatch.setattr(execution, "cores", lambda: 2)
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(psutil.cpu_count())]
    try:
        found = plan(Net(odd=odd), chosen)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert found.execution.threads == 2 and any("other processes" in why for why in found.rejected.values())
    monkeypatch.setattr(execution, "others_share", lambda before: 0.0)
    assert plan(Net(odd=odd), chosen).execution.threads == 1, "the next run, on the quiet machine, judges"


def test_a_network_that_multiplies_rounding_is_planned_like_others() -> None:
    """A network without pretrained weights would be trained by the slower plan: its gradients move by percents with the last bit."""

    class Chaotic(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if not x.is_contiguous():
                y = y * (1 + error)
            return torch.sin(y * factor) / factor

    factor, error = 1e6, 1e-7
    assert not train_plan(Chaotic(), settings(memory_format="auto")).rejected
    factor, error = 1.0, 0.5
    assert train_plan(Chaotic(), settings(memory_format="auto"), name="wrong").execution.memory_format == "contiguous"


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("micro_batch", [1, 5, 16, 64])
def test_outputs_do_not_depend_on_how_many_run_at_once(engine: str, micro_batch: int) -> None:
    """The filling of a last, shorter batch, or a seam between two, would show in her predictions."""
    network = Net().eval()
    how = Execution("channels_last", "fp32", engine, micro_batch, 1)
    torch.testing.assert_close(outputs(network, how), outputs(network, plain(how)._replace(micro_batch=16)))


def too_large_above(count: int):
    def odd(y: Tensor) -> Tensor:
        if len(y) > count:
            raise torch.OutOfMemoryError("out of memory, says the test")
        return y

    return odd


def test_out_of_memory_in_inference_halves_and_gives_the_same() -> None:
    """A run on a smaller GPU than the plan was made for would end an hour in."""
    said: list[str] = []
    run = Inference(
        Net(odd=too_large_above(3)), PREPROCESS, CPU, Execution("contiguous", "fp32", "eager", 16, 1), said.append
    )
    torch.testing.assert_close(run(IMAGES), outputs(Net(), plain(run.execution)._replace(micro_batch=16)))
    assert run.execution.micro_batch == 2 and len(said) == 3
    assert "2 examples at once" in said[-1] and "batch size stays" in said[-1]


def test_one_example_too_large_tells_what_to_do() -> None:
    """An endless halving, or a page of CUDA's, tells nobody to use smaller images."""
    run = Inference(Net(odd=too_large_above(0)), PREPROCESS, CPU, Execution("contiguous", "fp32", "eager", 4, 1))
    with pytest.raises(UserError, match=r"single example.*image_size"):
        run(IMAGES)


def test_a_plan_survives_too_little_memory() -> None:
    """Timing more at once than fits would end a run that, in smaller parts, fits."""
    chosen = settings(precision="auto")
    found = plan(Net(odd=too_large_above(4)), chosen)
    assert found.execution.micro_batch >= 4
    found = train_plan(Net(odd=too_large_above(4)), chosen)
    assert found.execution.micro_batch >= 4


def test_every_name_of_the_plan_is_logged() -> None:
    """A run whose precision is not in MLflow cannot be explained."""
    found = plan(Net(), settings()).params("inference")
    assert {f"plan_inference_{k}" for k in Execution._fields} < set(found)
    assert found["plan_inference_images_per_second"] > 0
    assert (
        execution.Planned(Execution("contiguous", "fp32", "eager", 8, 0), 0, 0, 0, {}).params("x")["plan_x_threads"]
        == 0
    )


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "wrong entry", "wrong rates", "no rates"])
def test_damaged_measurements_are_measured_anew(content: str) -> None:
    """A file in a cache that half a disk, or an editor, has spoiled would end every run with a trace."""
    network, chosen = Net(), settings()
    found = plan(network, chosen)
    kept = json.loads(measured_file().read_text(encoding="utf-8"))
    spoiled = {
        "wrong entry": dict.fromkeys(kept, 3),
        "wrong rates": {k: v | {"rates": {"plain": "fast"}} for k, v in kept.items()},
        "no rates": {k: v | {"rates": {"plain": 1.0}} for k, v in kept.items()},
    }
    text = json.dumps(spoiled[content]) if content in spoiled else content
    measured_file().write_text(text, encoding="utf-8")
    again = plan(network, chosen)
    assert again.execution._replace(threads=0) == found.execution._replace(threads=0) and again.images_per_second > 0
