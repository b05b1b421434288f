"""Fixtures that several tests share: a small real dataset and a small network with weights in a local file."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# What a developer has set must not reach the tests, nor their runs the developer's server.
for _name in (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "GRAFTWORK_JOURNALS",
    "GRAFTWORK_CHECKPOINTS",
    "GRAFTWORK_BUILD",
    "GRAFTWORK_IMAGE",
    "GRAFTWORK_STORE",
    "GRAFTWORK_S3_ANONYMOUS",
    *(name for name in os.environ if name.startswith("AWS_") and name != "AWS_CA_BUNDLE"),
):
    os.environ.pop(_name, None)
# Nor the credentials in her home, or those that a cloud's machine hands out.
os.environ |= {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: two workers share two cores
# What was measured on this machine for real runs must neither decide over a test nor be overwritten by one.
os.environ["GRAFTWORK_CACHE"] = tempfile.mkdtemp(prefix="graftwork-tests-")
atexit.register(shutil.rmtree, os.environ["GRAFTWORK_CACHE"], ignore_errors=True)
# Where MLflow keeps the addresses that it was told: they go before the environment.
MLFLOWS_OWN = {
    "mlflow.tracking._tracking_service.utils": "_tracking_uri",
    "mlflow.tracking._model_registry.utils": "_registry_uri",
}
TINY = "test_resnet.r160_in1k"  # timm's own network for tests: 0.5 million parameters, BatchNorm, a real head


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    """Handwritten digits, 24 a class to train, 6 to validate, 15 to test, packed."""
    from graftwork.dataset import open_dataset
    from graftwork.ingest import ingest
    from graftwork.settings import IngestSettings

    folder = tmp_path_factory.mktemp("data") / "digits"
    ingest(IngestSettings(data="digits", train_per_class=24, test_per_class=15), folder)
    return open_dataset(folder)


@pytest.fixture(scope="session")
def few(dataset):
    """80 of the digits to train and 20 to validate: five steps of 16 an epoch."""
    import pyarrow as pa

    train, val = dataset.split("train"), dataset.split("val")
    rows = [train.take(list(range(0, 240, 3))), val.take(list(range(0, 60, 3)))]
    return dataset._replace(manifest=pa.concat_tables(rows))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file for TINY. Random, but the same for every test."""
    return make_weights(TINY, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def make_weights(name: str, path: Path) -> Path:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def baseline(dataset, weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Model artifact of a linear probe on TINY's features."""
    from graftwork.baseline import train_baseline
    from graftwork.features import extract_features
    from graftwork.settings import FeatureSettings

    folder = tmp_path_factory.mktemp("baseline")
    settings = FeatureSettings(backbone=TINY, weights=str(weights), image_size=32, flip=False, views=2, plan_seconds=0)
    extract_features(dataset, settings, folder / "embeddings")
    train_baseline(folder / "embeddings", folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def tuned(dataset, baseline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Model artifact of TINY, fine-tuned for two epochs."""
    from graftwork.finetune import fine_tune
    from graftwork.settings import FineTuneSettings

    folder = tmp_path_factory.mktemp("tuned") / "model"
    fine_tune(dataset, baseline, FineTuneSettings(epochs=2, flip=False, strategy="full", plan_seconds=0), folder)
    return folder


@pytest.fixture(autouse=True)
def pillows_bound():
    """What a test decodes with a small bound leaves Pillow's own bound behind, which is the whole process's."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.fixture(autouse=True)
def mlflows_address():
    """What a test tells MLflow is left in the process and its environment, for whatever the next test asks or starts."""
    variables = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ[name] for name in variables if name in os.environ}
    yield
    for name in variables:
        os.environ.pop(name, None)
    os.environ.update(before)
    for module, name in MLFLOWS_OWN.items():
        if module in sys.modules:
            setattr(sys.modules[module], name, None)
