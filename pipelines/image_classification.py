"""The DAG: ingest, validate, extract features, baseline, fine-tune, (scratch control,) evaluate, register; on a cluster, close the MLflow run.

Its parameters mirror the settings models of ``graftwork.settings``, and say where steps run on a cluster; a test holds them together.
"""

import inspect
from typing import Any, NamedTuple

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from graftwork.components import IMAGE
from graftwork.components.close_run import close_run
from graftwork.components.evaluate_model import evaluate_model
from graftwork.components.extract_features import extract_features
from graftwork.components.fine_tune import fine_tune
from graftwork.components.ingest_data import ingest_data
from graftwork.components.register_model import register_model
from graftwork.components.train_baseline import train_baseline
from graftwork.components.validate_data import validate_data
from graftwork.files import STORE
from graftwork.tracking import CHECKPOINTS, KEPT_JOURNALS

NAME = "graftwork-image-classification"
DESCRIPTION = "Adapts a pretrained network to labelled images, proves the result and registers it in MLflow."
# Requests and limits of a light step on a cluster, and the hours after which a step is given up. A heavy one's are run-time parameters.
LIGHT_CPU, LIGHT_MEMORY, LIGHT_LIMIT, LIGHT_HOURS, HEAVY_HOURS = "1", "2Gi", "4Gi", 2, 24
MLFLOW_KEYS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
S3_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
VOLUME_AT = "/checkpoints"


class Cluster(NamedTuple):
    """What is fixed when a pipeline is compiled for a cluster; empty leaves it out."""

    queue: str = ""  # of Kueue
    priority: str = ""  # of Kueue's WorkloadPriorityClasses
    volume: str = "graftwork-checkpoints"  # PersistentVolumeClaim for checkpoints, packs and journals: training goes on after a node is lost
    mlflow_secret: str = "graftwork-mlflow"
    s3_secret: str = "graftwork-s3"


def make_pipeline(
    with_scratch_control: bool = False, local: bool = False, build: str = "", cluster: Cluster | None = None
) -> Any:
    """Return the pipeline. The control is a matter of the graph, so it is chosen here and not by a parameter.

    ``local`` leaves out what only a cluster knows, and lets ``ingest_data`` be cached, since ``source_fingerprint`` tells of any change.
    ``build`` is a digest of the code: it reaches the key of the local cache, which would not notice an edited library.
    """
    on = cluster or Cluster()

    class Outputs(NamedTuple):
        dataset: dsl.Dataset
        validation: dsl.HTML
        embeddings: dsl.Artifact
        baseline: dsl.Model
        fine_tuned: dsl.Model
        evaluation: dsl.Artifact
        decision: dsl.Artifact
        report: dsl.HTML

    @dsl.pipeline(
        name=NAME,
        description=DESCRIPTION,
    )
    def image_classification(
        data: str = "fashion-mnist",
        modality: str = "auto",
        text_column: str = "",
        label_column: str = "",
        source_fingerprint: str = "",
        train_per_class: int = 0,
        test_per_class: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        split_by: str = "content",
        max_pixels: int = 100000000,
        max_side: int = 1024,
        max_characters: int = 1000000,
        max_broken: float = 0.05,
        min_per_class: int = 3,
        min_side: int = 8,
        max_aspect: float = 8.0,
        min_contrast: float = 2.0,
        min_characters: int = 2,
        long_text: int = 10000,
        max_imbalance: float = 50.0,
        max_drift: float = 0.1,
        near_duplicates: bool = True,
        classes: list = [],  # noqa: B006  KFP copies it into the spec
        suite: str = "",
        reference: str = "champion",
        memory_format: str = "auto",
        precision: str = "auto",
        engine: str = "auto",
        micro_batch: int = 0,
        threads: int = 0,
        plan_seconds: float = 120.0,
        backbone: str = "tf_efficientnet_lite0",
        weights: str = "",
        image_size: int = 0,
        max_length: int = 0,
        pooling: str = "auto",
        preprocess: str = "fixed",
        resize: str = "crop",
        crop_pct: float = 1.0,
        interpolation: str = "",
        mean: list = [],  # noqa: B006  KFP copies it into the spec
        std: list = [],  # noqa: B006  KFP copies it into the spec
        views: int = 0,
        flip: str = "auto",
        shift: float = 0.05,
        memory_share: float = 0.3,
        strategy: str = "auto",
        lp_ft: bool = True,
        batchnorm: str = "auto",
        epochs: int = 0,
        batch_size: int = 0,
        optimizer: str = "adamw",
        learning_rate: float = 0.0,
        rate_test: bool = False,
        schedule: str = "cosine",
        warmup: float = 0.1,
        layer_decay: float = 0.0,
        reset_layers: int = 0,
        weight_decay: float = 0.05,
        clip_norm: float = 1.0,
        label_smoothing: float = 0.1,
        mixup: float = -1.0,
        cutmix: float = 0.0,
        balance: str = "auto",
        ema_decay: float = 0.98,
        wise_ft: bool = False,
        soup: int = 0,
        metric: str = "accuracy",
        patience: int = 4,
        seeds: int = 1,
        checkpoint_seconds: float = 30.0,
        confidence: float = 0.95,
        resamples: int = 2000,
        slices: list = [],  # noqa: B006  KFP copies it into the spec
        corruptions: list = [],  # noqa: B006  KFP copies it into the spec
        attributions: bool = False,
        learning_curve: str = "",
        register_as: str = "",
        policy: str = "",
        seed: int = 0,
        gpu_type: str = "nvidia.com/gpu",
        gpu_count: str = "",
        gpu_node_selector: dict = {},  # noqa: B006  KFP copies it into the spec
        gpu_tolerations: list = [],  # noqa: B006  KFP copies it into the spec
        training_cpu: str = "2",
        training_memory: str = "8Gi",
    ) -> Outputs:
        ingest = ingest_data(
            data=data,
            modality=modality,
            text_column=text_column,
            label_column=label_column,
            source_fingerprint=source_fingerprint,
            train_per_class=train_per_class,
            test_per_class=test_per_class,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_by=split_by,
            slices=slices,
            max_pixels=max_pixels,
            max_side=max_side,
            max_characters=max_characters,
            seed=seed,
        )
        packed = {"dataset": ingest.outputs["dataset"], "dataset_digest": ingest.outputs["Output"]}
        validate = validate_data(
            **packed,
            max_broken=max_broken,
            min_per_class=min_per_class,
            min_side=min_side,
            max_aspect=max_aspect,
            min_contrast=min_contrast,
            min_characters=min_characters,
            long_text=long_text,
            max_imbalance=max_imbalance,
            max_drift=max_drift,
            near_duplicates=near_duplicates,
            classes=classes,
            suite=suite,
            reference=reference,
            register_as=register_as,
        )
        features = extract_features(
            **packed,
            memory_format=memory_format,
            precision=precision,
            engine=engine,
            micro_batch=micro_batch,
            threads=threads,
            plan_seconds=plan_seconds,
            backbone=backbone,
            weights=weights,
            image_size=image_size,
            max_length=max_length,
            pooling=pooling,
            preprocess=preprocess,
            resize=resize,
            crop_pct=crop_pct,
            interpolation=interpolation,
            mean=mean,
            std=std,
            views=views,
            flip=flip,
            shift=shift,
            memory_share=memory_share,
            seed=seed,
        ).after(validate)
        baseline = train_baseline(
            embeddings=features.outputs["embeddings"], embeddings_digest=features.outputs["Output"]
        )
        training = {
            **packed,
            "baseline": baseline.outputs["model"],
            "baseline_digest": baseline.outputs["Output"],
            "memory_format": memory_format,
            "precision": precision,
            "engine": engine,
            "micro_batch": micro_batch,
            "threads": threads,
            "plan_seconds": plan_seconds,
            "batchnorm": batchnorm,
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "schedule": schedule,
            "warmup": warmup,
            "layer_decay": layer_decay,
            "reset_layers": reset_layers,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "label_smoothing": label_smoothing,
            "mixup": mixup,
            "cutmix": cutmix,
            "balance": balance,
            "ema_decay": ema_decay,
            "wise_ft": wise_ft,
            "soup": soup,
            "metric": metric,
            "patience": patience,
            "flip": flip,
            "shift": shift,
            "memory_share": memory_share,
            "checkpoint_seconds": checkpoint_seconds,
            "seed": seed,
        }
        tuned = fine_tune(
            **training, strategy=strategy, learning_rate=learning_rate, rate_test=rate_test, lp_ft=lp_ft, seeds=seeds
        )
        with_gpu, heavy, light = [features, tuned], [baseline], [ingest, validate]
        models = {"baseline": baseline.outputs["model"], "fine_tuned": tuned.outputs["model"]}
        digests = {"baseline_digest": baseline.outputs["Output"], "fine_tuned_digest": tuned.outputs["Output"]}
        if with_scratch_control:
            # Random layers need another rate than pretrained ones: the control takes its own.
            control = fine_tune(**training, strategy="scratch").set_display_name("train-scratch")
            if local:
                control.after(
                    tuned
                )  # here tasks run one after the other anyhow, and so in an order that can be followed
            models["scratch"] = control.outputs["model"]
            digests["scratch_digest"] = control.outputs["Output"]
            with_gpu.append(control)
        evaluation = evaluate_model(
            **packed,
            **models,
            **digests,
            embeddings=features.outputs["embeddings"],
            embeddings_digest=features.outputs["Output"],
            confidence=confidence,
            resamples=resamples,
            metric=metric,
            slices=slices,
            corruptions=corruptions,
            attributions=attributions,
            learning_curve=learning_curve,
            seed=seed,
        )
        registration = register_model(
            **packed,
            **models,
            evaluation=evaluation.outputs["evaluation"],
            validation=validate.outputs["metrics"],
            register_as=register_as,
            policy=policy,
        )
        with_gpu.append(evaluation)
        heavy.append(registration)
        for task in (*light, *heavy, *with_gpu):
            if local:
                task.set_env_variable("GRAFTWORK_BUILD", build)
                continue
            on_cluster(task, on, LIGHT_HOURS if task in light else HEAVY_HOURS)
            if task in light:
                task.set_cpu_request(LIGHT_CPU).set_memory_request(LIGHT_MEMORY).set_memory_limit(LIGHT_LIMIT)
            else:
                task.set_cpu_request(training_cpu)
                task.set_memory_request(training_memory).set_memory_limit(training_memory)
            if task in with_gpu:
                # An empty count, selector and list of tolerations leave nothing in the pod: the same file runs on the CPU.
                task.set_accelerator_type(gpu_type).set_accelerator_limit(gpu_count)
                kubernetes.add_node_selector_json(task, gpu_node_selector)
                kubernetes.add_toleration_json(task, gpu_tolerations)
                # The default of 64 MB is too little for threads and processes that share tensors; what is used counts as the step's memory.
                kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit="2Gi")
        # The champion may have changed since the last run.
        registration.set_caching_options(False)
        if not local:
            # On a cluster, data may have changed behind the same name, and validation and registration look at the champion, which is
            # no parameter. The others may be reused: KFP's cache looks at the image, at parameters, and at artifacts by their names
            # alone, not at what is in them; so each step hands the digest of what it made on to the next as a parameter.
            for task in (*light, *heavy, *with_gpu):
                task.set_caching_options(task not in (ingest, validate, registration))
        return Outputs(
            dataset=ingest.outputs["dataset"],
            validation=validate.outputs["report"],
            embeddings=features.outputs["embeddings"],
            baseline=baseline.outputs["model"],
            fine_tuned=tuned.outputs["model"],
            evaluation=evaluation.outputs["evaluation"],
            decision=registration.outputs["decision"],
            report=registration.outputs["report"],
        )

    return image_classification if local else with_end(image_classification, on)


def with_end(steps: Any, on: Cluster) -> Any:
    """Return the pipeline ``steps`` followed by ``close_run``, which runs whatever became of them.

    The steps stay a pipeline of their own, nested: KFP does not hand the parameters of resources into the group of an exit handler.
    """
    signature = inspect.signature(steps.pipeline_func)

    def image_classification(*values: Any) -> None:
        given = dict(zip(signature.parameters, values, strict=True))
        end = close_run(data=given["data"], backbone=given["backbone"])
        on_cluster(end, on, LIGHT_HOURS)
        end.set_cpu_request("100m").set_memory_request("512Mi").set_memory_limit("1Gi").set_caching_options(False)
        with dsl.ExitHandler(end, name="steps-and-end"):
            steps(**given)

    image_classification.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
    return dsl.pipeline(name=NAME, description=DESCRIPTION)(image_classification)


def on_cluster(task: PipelineTask, on: Cluster, hours: int) -> None:
    """Give a task what a cluster needs to know: retries, a deadline, a user, its queue, its volume, and how to reach MLflow and S3."""
    task.set_retry(2, backoff_duration="30s", backoff_factor=2, backoff_max_duration="300s")
    kubernetes.set_timeout(task, hours * 3600)
    kubernetes.set_security_context(task, run_as_user=1000, run_as_group=1000, run_as_non_root=True)
    # All steps of one pipeline run find each other by its id; the secrets are optional, without them nothing is tracked and no bucket is read.
    kubernetes.use_field_path_as_env(task, "GRAFTWORK_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    for secret, keys in ((on.mlflow_secret, MLFLOW_KEYS), (on.s3_secret, S3_KEYS)):
        if secret:
            kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
    task.set_env_variable("GRAFTWORK_IMAGE", IMAGE)
    if on.volume:
        kubernetes.mount_pvc(task, pvc_name=on.volume, mount_path=VOLUME_AT)
        places = {CHECKPOINTS: "jobs", STORE: "packs", KEPT_JOURNALS: "journals"}
        for name, folder in places.items():
            task.set_env_variable(name, f"{VOLUME_AT}/{folder}")
    if on.queue:
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", on.queue)
    if on.priority:
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/priority-class", on.priority)
