"""The structure: what may import what, and what a step may cost to start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "graftwork").glob("*.py")), ids=lambda p: p.name)
def test_library_knows_neither_kfp_nor_the_layers_above(path: Path) -> None:
    """A step that needs KFP can be neither tested nor run without it."""
    above = [
        m
        for m in imports(path)
        if m.split(".")[0] == "kfp" or m.startswith(("graftwork.components", "graftwork.pipelines"))
    ]
    assert not above


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("*.py")), ids=lambda p: p.name)
def test_components_know_only_the_steps(path: Path) -> None:
    """A component that does more than call the library hides work where no unit test looks."""
    allowed = {"kfp", "typing", "graftwork", "graftwork.components", "os"}
    assert imports(path) <= allowed


def test_mlflow_folder_never_shadows_the_package() -> None:
    """An __init__.py in mlflow/ would break every import of MLflow from the repository's root."""
    assert not (ROOT / "mlflow" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (
            "graftwork.pipelines.cli",
            ("torch", "timm", "mlflow", "kfp", "pandas", "great_expectations", "sklearn", "boto3"),
        ),
        ("graftwork.steps", ("torch", "timm", "mlflow", "kfp", "pandas", "great_expectations", "sklearn", "boto3")),
        ("graftwork.ingest", ("torch", "timm", "mlflow", "pandas", "great_expectations", "sklearn")),
        ("graftwork.validate", ("torch", "timm", "mlflow")),
        ("graftwork.baseline", ("torch", "timm", "mlflow", "great_expectations")),
        ("graftwork.finetune", ("mlflow", "great_expectations", "kfp")),
        ("graftwork.evaluate", ("mlflow", "great_expectations", "kfp")),
    ],
)
def test_start_up_imports_only_what_the_step_needs(module: str, heavy: tuple[str, ...]) -> None:
    """Every step is a process of its own: one stray import costs seconds, eight times a run."""
    code = f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert found == []
