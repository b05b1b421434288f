"""From the DAG to what a cluster takes: KFP's IR YAML, or ``Pipeline`` and ``PipelineVersion`` resources for kubectl and GitOps."""

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path

from graftwork.errors import UserError, one_line

FORMATS = ("yaml", "manifests")
KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")


def compile_pipeline(
    output: Path,
    image: str = "",
    with_scratch_control: bool = False,
    file_format: str = "yaml",
    queue: str = "",
    priority: str = "",
    volume: str = "graftwork-checkpoints",
    mlflow_secret: str = "graftwork-mlflow",
    s3_secret: str = "graftwork-s3",
) -> None:
    """Write the compiled pipeline to ``output``, whole or not at all.

    ``file_format`` "manifests" writes a ``Pipeline`` and a ``PipelineVersion``, the latter named by its contents, so that applying the
    same file twice changes nothing.

    Raises:
        UserError: not a .yaml file, no such format, a name that Kubernetes does not take, or the file cannot be written.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"output {one_line(output)}: KFP wants a .yaml file")
    if file_format not in FORMATS:
        raise UserError(f"format '{one_line(file_format)}': there is none of this name; choose yaml or manifests")
    check_names(image, queue, priority, volume)
    if image:
        os.environ["GRAFTWORK_IMAGE"] = image  # the components read it when they are imported
    warnings.simplefilter("ignore")
    from kfp.compiler import Compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    from graftwork.pipelines.image_classification import NAME, Cluster, make_pipeline

    pipeline = make_pipeline(with_scratch_control, cluster=Cluster(queue, priority, volume, mlflow_secret, s3_secret))
    partial = output.with_name(f".{output.stem}.partial.yaml")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        Compiler().compile(pipeline, str(partial))
        if file_format == "manifests":
            version = f"{NAME}-{hashlib.sha256(partial.read_bytes()).hexdigest()[:12]}"
            options = KubernetesManifestOptions(
                pipeline_name=NAME, pipeline_version_name=version, include_pipeline_manifest=True
            )
            Compiler().compile(
                pipeline, str(partial), kubernetes_manifest_options=options, kubernetes_manifest_format=True
            )
        partial.replace(output)
    except OSError as error:
        raise UserError(
            f"output {one_line(output)}: cannot be written ({error.strerror}); give another with --output"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def check_names(image: str, queue: str, priority: str, volume: str) -> None:
    """Raise UserError for a name that Kubernetes would refuse, in every pod of the run."""
    if re.search(r"\s", image):
        raise UserError(f"image '{one_line(image)}': is no reference of an image; give REGISTRY/NAME@sha256:...")
    for what, name in (("queue", queue), ("priority", priority), ("volume", volume)):
        if name and not KUBERNETES_NAME.fullmatch(name):
            raise UserError(
                f"{what} '{one_line(name)}': is no name in Kubernetes; give small letters, digits and hyphens, at most 63"
            )
