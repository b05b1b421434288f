"""GPU node pools: what tells a cluster's scheduler where a step with a GPU may run, as run-time parameters of the compiled pipeline.

One compiled file serves every pool and none: an empty count asks for no GPU, empty selectors and tolerations are left out of the pod.
"""

from typing import Any

from graftwork.errors import UserError, one_line

NVIDIA = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
# Label of the kind of GPU, an example of its value, tolerations of the GPU nodes' taints, and label, value and tolerations of spot nodes.
# Sources: the clouds' own documentation of node labels and taints; a taint of another name is a matter of --set gpu_tolerations=...
PRESETS: dict[str, dict[str, Any]] = {
    "gke": {
        "label": "cloud.google.com/gke-accelerator",
        "example": "nvidia-l4",
        "tolerations": [NVIDIA],
        "spot": {"cloud.google.com/gke-spot": "true"},
        "spot_tolerations": [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ],
    },
    "eks": {
        "label": "karpenter.k8s.aws/instance-gpu-name",
        "example": "l4",
        "tolerations": [NVIDIA],
        "spot": {"karpenter.sh/capacity-type": "spot"},
        "spot_tolerations": [],
    },
    "aks": {
        "label": "kubernetes.azure.com/accelerator",
        "example": "nvidia",
        "tolerations": [{"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}, NVIDIA],
        "spot": {"kubernetes.azure.com/scalesetpriority": "spot"},
        "spot_tolerations": [
            {
                "key": "kubernetes.azure.com/scalesetpriority",
                "operator": "Equal",
                "value": "spot",
                "effect": "NoSchedule",
            }
        ],
    },
    "gpu-operator": {
        "label": "nvidia.com/gpu.product",
        "example": "NVIDIA-L4",
        "tolerations": [NVIDIA],
        "spot": {},
        "spot_tolerations": [],
    },
}


def pool_parameters(preset: str, gpu: str = "", count: int = 1, spot: bool = False) -> dict[str, Any]:
    """Return the pipeline's placement parameters for a preset: "none" (the CPU), "gke", "eks", "aks" or "gpu-operator".

    ``gpu`` is the kind of GPU, as the nodes' label has it ("nvidia-l4" on GKE); empty takes any node with a GPU.

    Raises:
        UserError: no such preset, a count that makes no sense, or a pool that has no spot nodes.
    """
    if preset == "none":
        if gpu or spot:
            raise UserError("gpu pool none: runs on the CPU; leave out the kind of GPU and spot, or name a pool")
        return {"gpu_count": "", "gpu_node_selector": {}, "gpu_tolerations": []}
    if preset not in PRESETS:
        raise UserError(
            f"gpu pool '{one_line(preset)}': there is none of this name; choose one of none, {', '.join(PRESETS)}"
        )
    if count < 1:
        raise UserError(f"gpu count {count}: a step takes one GPU or more; for the CPU use the pool none")
    pool = PRESETS[preset]
    if spot and not pool["spot"]:
        raise UserError(
            f"gpu pool {preset}: knows no spot nodes; give their label and taint with --set gpu_node_selector=... and gpu_tolerations=..."
        )
    selector = ({pool["label"]: gpu} if gpu else {}) | (pool["spot"] if spot else {})
    tolerations = [*pool["tolerations"], *(pool["spot_tolerations"] if spot else [])]
    return {"gpu_count": str(count), "gpu_node_selector": selector, "gpu_tolerations": tolerations}
