"""Components mirror the settings of their steps: a setting added in one place and forgotten in another is found here."""

import inspect
from typing import Any

import pytest

from graftwork import settings as s
from graftwork.components.close_run import close_run
from graftwork.components.evaluate_model import evaluate_model
from graftwork.components.extract_features import extract_features
from graftwork.components.fine_tune import fine_tune
from graftwork.components.ingest_data import ingest_data
from graftwork.components.register_model import register_model
from graftwork.components.train_baseline import train_baseline
from graftwork.components.validate_data import validate_data
from graftwork.pipelines.image_classification import make_pipeline

COMPONENTS: dict[str, tuple[Any, type[s.Settings] | None]] = {
    "ingest_data": (ingest_data, s.IngestSettings),
    "validate_data": (validate_data, s.ValidateSettings),
    "extract_features": (extract_features, s.FeatureSettings),
    "train_baseline": (train_baseline, None),
    "fine_tune": (fine_tune, s.FineTuneSettings),
    "evaluate_model": (evaluate_model, s.EvaluateSettings),
    "register_model": (register_model, s.RegisterSettings),
}


def parameters(component: Any) -> dict[str, Any]:
    """Return {name: default} of a component's parameters; artifacts and their digests are no settings."""
    found = {}
    for name, spec in (component.component_spec.inputs or {}).items():
        if not spec.type.startswith("system.") and not name.endswith("_digest"):
            found[name] = spec.default
    return found


def defaults(model: type[s.Settings] | None) -> dict[str, Any]:
    fields = model.model_fields if model else {}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_has_the_fields_of_its_settings(name: str) -> None:
    """A setting with another default on the cluster than on the laptop would give another model there."""
    component, model = COMPONENTS[name]
    assert parameters(component) == defaults(model)


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_passes_every_parameter_on(name: str) -> None:
    """A parameter that is taken and then forgotten looks like a setting and does nothing."""
    component, _ = COMPONENTS[name]
    source = inspect.getsource(component.python_func)
    for parameter in parameters(component):
        assert f"{parameter}={parameter}" in source


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_input_is_described(name: str) -> None:
    """KFP's form shows these sentences; without them a user has names alone."""
    component, _ = COMPONENTS[name]
    assert component.component_spec.description
    for one, spec in (component.component_spec.inputs or {}).items():
        assert spec.description, one


def test_pipeline_has_every_setting_with_its_default() -> None:
    """A setting that the pipeline does not take cannot be set on a cluster at all."""
    expected: dict[str, Any] = {}
    for _, model in COMPONENTS.values():
        for name, value in defaults(model).items():
            assert expected.setdefault(name, value) == value, f"{name} has two defaults"
    placement = {"gpu_type", "gpu_count", "gpu_node_selector", "gpu_tolerations", "training_cpu", "training_memory"}
    for pipeline in (make_pipeline(), make_pipeline(local=True)):
        found = parameters(pipeline)
        assert {name: value for name, value in found.items() if name not in placement} == expected
        assert placement < set(found)


def test_the_last_step_passes_every_parameter_on() -> None:
    """The end of a run that does not learn how the steps ended closes it as something that it was not."""
    source = inspect.getsource(close_run.python_func)
    assert "status.state" in source and "status.error_message" in source
    assert all(f"{name}={name}" in source for name in ("data", "backbone"))
    assert close_run.component_spec.description


@pytest.mark.parametrize("name", COMPONENTS)
def test_installs_nothing_at_run_time(name: str) -> None:
    """A pod that installs at start is slow, needs the network, and is another one every day."""
    component, _ = COMPONENTS[name]
    command = " ".join(component.component_spec.implementation.container.command)
    assert "pip install" not in command
