"""Where steps with a GPU may run: presets of the clouds' node pools."""

import json

import pytest

from graftwork.errors import UserError
from graftwork.pipelines.pools import PRESETS, pool_parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_a_pool_is_selected_and_its_taint_tolerated(preset: str) -> None:
    """A step that does not tolerate the pool's taint waits for ever; one that selects nothing lands on any GPU, the dearest too."""
    found = pool_parameters(preset, PRESETS[preset]["example"], count=2)
    assert found["gpu_count"] == "2"  # a text: KFP reads a number there as ""
    assert found["gpu_node_selector"] == {PRESETS[preset]["label"]: PRESETS[preset]["example"]}
    assert found["gpu_tolerations"]
    for toleration in found["gpu_tolerations"]:
        assert toleration["effect"] == "NoSchedule"
        assert toleration["operator"] == "Exists" or toleration["value"]
    json.dumps(found)
    assert pool_parameters(preset)["gpu_node_selector"] == {}


def test_none_is_the_cpu() -> None:
    """The very same file has to run where there is no GPU at all."""
    assert pool_parameters("none") == {"gpu_count": "", "gpu_node_selector": {}, "gpu_tolerations": []}


@pytest.mark.parametrize("preset", ["gke", "eks", "aks"])
def test_spot_nodes_are_selected_as_well(preset: str) -> None:
    """Spot that silently means on-demand costs three times as much."""
    plain, spot = pool_parameters(preset, "l4"), pool_parameters(preset, "l4", spot=True)
    assert plain["gpu_node_selector"].items() < spot["gpu_node_selector"].items()
    assert len(spot["gpu_tolerations"]) >= len(plain["gpu_tolerations"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gcp",), "choose one of none, gke, eks, aks, gpu-operator"),
        (("gke", "", 0), "one GPU or more"),
        (("gpu-operator", "", 1, True), "knows no spot nodes"),
        (("none", "l4"), "runs on the CPU"),
        (("none", "", 1, True), "runs on the CPU"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple, message: str) -> None:
    """A pool that does not exist is found out by a pod that waits for ever."""
    with pytest.raises(UserError, match=message) as raised:
        pool_parameters(*arguments)
    assert "\n" not in str(raised.value)
