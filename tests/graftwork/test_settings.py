"""Settings: what is accepted, what is refused, and the one line that a user reads."""

import inspect
import types
import typing

import pytest
from pydantic import ValidationError

from graftwork import settings as s
from graftwork.errors import UserError, one_line
from graftwork.settings import Settings, parse

MODELS = sorted(
    (m for _, m in inspect.getmembers(s, inspect.isclass) if issubclass(m, Settings) and m is not Settings),
    key=lambda m: m.__name__,
)


def test_the_models_are_found() -> None:
    """A user would have no guard at all: the tests below would run over nothing."""
    assert {m.__name__ for m in MODELS} >= {"IngestSettings", "ValidateSettings", "FeatureSettings", "FineTuneSettings"}


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_defaults_obey_their_own_bounds(model: type[Settings]) -> None:
    """A user who sets nothing would be told that a value, never typed, is wrong."""
    defaults = model().model_dump()
    assert parse(model, defaults) == model()


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_no_setting_can_be_none(model: type[Settings]) -> None:
    """A user could not set it on a cluster: a Kubeflow parameter has no null."""
    for name, field in model.model_fields.items():
        kinds = typing.get_args(field.annotation) if isinstance(field.annotation, types.UnionType) else ()
        assert type(None) not in (*kinds, *typing.get_args(field.annotation)), name
        assert field.default is not None and not field.is_required(), name


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_an_unknown_setting_is_refused_by_name(model: type[Settings]) -> None:
    """A user's misspelt setting would be passed over in silence, and the run be another than was asked for."""
    with pytest.raises(UserError, match="setting epochz = 5"):
        parse(model, {"epochz": 5})


BAD = [
    (s.IngestSettings, "data", ""),
    (s.IngestSettings, "val_fraction", 0.0),
    (s.IngestSettings, "val_fraction", 0.9),
    (s.IngestSettings, "test_fraction", 1.5),
    (s.IngestSettings, "test_fraction", float("nan")),
    (s.IngestSettings, "train_per_class", -1),
    (s.IngestSettings, "train_per_class", 1.5),
    (s.IngestSettings, "max_pixels", 0),
    (s.IngestSettings, "seed", -1),
    (s.IngestSettings, "seed", 2**64),  # torch and NumPy raise on it, an hour later
    (s.IngestSettings, "seed", None),
    (s.FineTuneSettings, "seed", 2**64),
    (s.FeatureSettings, "seed", 2**64),
    (s.ValidateSettings, "max_broken", 1.0),
    (s.ValidateSettings, "max_broken", -0.1),
    (s.ValidateSettings, "min_per_class", 0),
    (s.ValidateSettings, "min_side", "tall"),
    (s.FeatureSettings, "image_size", 5000),
    (s.FeatureSettings, "resize", "stretch"),
    (s.FeatureSettings, "crop_pct", 0),
    (s.FeatureSettings, "interpolation", "area"),
    (s.FeatureSettings, "mean", [1.0, 2.0, 3.0, 4.0]),
    (s.FeatureSettings, "std", [float("inf")]),
    (s.FeatureSettings, "shift", 0.6),
    (s.FineTuneSettings, "strategy", "everything"),
    (s.FineTuneSettings, "learning_rate", float("inf")),
    (s.FineTuneSettings, "layer_decay", 1.01),
    (s.FineTuneSettings, "layer_decay", -0.1),
    (s.FineTuneSettings, "warmup", 1),
    (s.FineTuneSettings, "batch_size", -1),
    (s.FineTuneSettings, "optimizer", "adam"),
    (s.FineTuneSettings, "schedule", "linear"),
    (s.FineTuneSettings, "batchnorm", "yes"),
    (s.FineTuneSettings, "balance", "classes"),
    (s.FineTuneSettings, "metric", "f1"),
    (s.FineTuneSettings, "mixup", -2),
    (s.FineTuneSettings, "cutmix", -0.1),
    (s.FineTuneSettings, "soup", 21),
    (s.FineTuneSettings, "flip", "maybe"),
    (s.FineTuneSettings, "flip", 1),
    (s.FineTuneSettings, "memory_share", 1.1),
    (s.FineTuneSettings, "checkpoint_seconds", -1),
    (s.FineTuneSettings, "precision", "fp8"),
    (s.FineTuneSettings, "engine", "onnx"),
    (s.FineTuneSettings, "memory_format", "nchw"),
    (s.FineTuneSettings, "micro_batch", -1),
    (s.FineTuneSettings, "threads", 2000),
    (s.FineTuneSettings, "plan_seconds", float("inf")),
    (s.FeatureSettings, "flip", "false"),
    (s.FeatureSettings, "preprocess", "own"),
    (s.FeatureSettings, "views", 33),
    (s.EvaluateSettings, "metric", "f1"),
    (s.EvaluateSettings, "confidence", 0.5),
    (s.EvaluateSettings, "resamples", 10),
]


@pytest.mark.parametrize(("model", "name", "value"), BAD, ids=[f"{n}={str(v)[:20]}" for _, n, v in BAD])
def test_a_value_out_of_bounds_is_named_in_one_line(model: type[Settings], name: str, value: object) -> None:
    """A user would wait for a run to fail late, or read a page of pydantic's to find which setting was meant."""
    with pytest.raises(UserError) as raised:
        parse(model, {name: value})
    text = str(raised.value)
    assert text.startswith(f"setting {name} = {value!r}: ") and "\n" not in text
    assert len(text) > len(f"setting {name} = {value!r}: ") + 5


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (s.IngestSettings, {"data": "photos\nof cats", "val_fraction": 0.89, "test_fraction": 0.01}),
        (s.IngestSettings, {"seed": 2**63 - 1, "max_pixels": 1}),
        (s.ValidateSettings, {"max_broken": 0.0, "min_per_class": 1}),
        (s.FeatureSettings, {"image_size": 4096, "crop_pct": 1, "mean": [0.5], "std": [0.5, 0.5, 0.5], "shift": 0.5}),
        (s.FineTuneSettings, {"epochs": 10_000, "warmup": 0.0, "layer_decay": 1.0, "ema_decay": 0}),
        (s.FineTuneSettings, {"layer_decay": 0.0, "mixup": -1.0, "soup": 20, "memory_share": 0.0, "plan_seconds": 0.0}),
        (s.FeatureSettings, {"resize": "pad", "preprocess": "auto", "threads": 1024, "memory_share": 1.0, "views": 32}),
        (s.EvaluateSettings, {"confidence": 0.99, "resamples": 100}),
    ],
)
def test_values_on_the_bounds_are_taken(model: type[Settings], values: dict[str, object]) -> None:
    """A user would be refused what the page of settings allows."""
    found = parse(model, values).model_dump()
    assert {k: found[k] for k in values} == values


@pytest.mark.parametrize("model", [s.FeatureSettings, s.FineTuneSettings])
@pytest.mark.parametrize(
    ("given", "read"), [(True, "yes"), (False, "no"), ("auto", "auto"), ("yes", "yes"), ("no", "no")]
)
def test_mirroring_is_a_choice_or_a_truth_value(model: type[Settings], given: object, read: str) -> None:
    """A user's script from before, with flip=True, would fail, or mirror her digits."""
    assert parse(model, {"flip": given}).model_dump()["flip"] == read


def test_a_line_break_in_a_value_stays_out_of_the_message() -> None:
    """A user's log would hold a line that graftwork did not write, after a name with a line break."""
    with pytest.raises(UserError) as raised:
        parse(s.FeatureSettings, {"resize": "crop\nError: all is lost"})
    assert "\n" not in str(raised.value) and "resize" in str(raised.value)


def test_settings_cannot_be_changed_once_read() -> None:
    """A user's tracked parameters could differ from what the step did."""
    chosen = s.FineTuneSettings()
    with pytest.raises(ValidationError):
        chosen.epochs = 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain é 中", "plain é 中"),
        ("two\nlines\r\x1b[31m", "two\\nlines\\r\\x1b[31m"),
        ("caf\udce9", "caf\\udce9"),
        ("x" * 500, "x" * 299 + "…"),
    ],
)
def test_one_line_is_printable_and_short(text: str, expected: str) -> None:
    """A user's terminal would be recoloured, or a log line forged, by the name of a file."""
    assert one_line(text) == expected
    assert one_line(text).isprintable()
