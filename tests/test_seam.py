"""The seam: outside the modules that read, transform, describe, show and load, no code asks whether it has images or texts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.modality import MODALITIES

ROOT = Path(__file__).parent.parent
# What the modules of a modality are made of, beside those that ``MODALITIES`` names.
HELPERS = {
    "image": {"augmentation", "convolutions", "corruptions", "decoders", "duplicates", "preprocessing", "saliency"},
    "text": set(),
}
LIBRARIES = {"PIL", "transformers", "tokenizers", "datasketch", "ftfy"}
OWN = {name: {m.removeprefix("graftwork.") for m in MODALITIES[name].values()} | HELPERS[name] for name in MODALITIES}
GENERIC = sorted(
    path
    for folder in ("graftwork", "components", "pipelines")
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in {*OWN["image"], *OWN["text"], "modality"}
)


def asked(tree: ast.AST) -> list[str]:
    """Return the places where a module compares something with the name of a modality, or looks at a modality's own class."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            values = {leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)}
            if values & set(MODALITIES):
                found.append(f"line {node.lineno}: compares with {sorted(values & set(MODALITIES))}")
        if isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in MODALITIES:
            found.append(f"line {node.lineno}: matches {node.value.value}")
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") == "isinstance"
            and "Preprocess" in ast.dump(node)
        ):
            found.append(f"line {node.lineno}: asks of which class a preprocessing is")
    return found


def imported(tree: ast.AST) -> list[str]:
    """Return what a module imports, also within functions, that belongs to one modality."""
    modules = {f"graftwork.{name}" for names in OWN.values() for name in names} | LIBRARIES
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"line {node.lineno}: {name}" for name in names if name in modules or name.split(".")[0] in LIBRARIES]
    return found


# What may know one modality alone, and why.
EXCEPTIONS = {
    "exporting.py": {"graftwork.images"},  # a type; what has no ONNX graph says so by ``Inputs.ONNX``
    "finetune.py": {"graftwork.convolutions"},  # faster gradients of convolutions, where a network has any
}


@pytest.mark.parametrize("path", GENERIC, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_code_asks_which_modality_it_has(path: Path) -> None:
    """Where the training loop asks, the third modality is a change of the training loop, and the first is broken by the second."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = EXCEPTIONS.get(path.name, set())
    assert asked(tree) + [line for line in imported(tree) if line.split(": ")[1] not in allowed] == []


def test_the_test_sees_what_it_looks_for() -> None:
    """A test that cannot fail holds nothing."""
    for line in (
        'if info["modality"] == "text": pass',
        'if x in ("image", "audio"): pass',
        "isinstance(p, Preprocess)",
    ):
        assert asked(ast.parse(line)), line
    for line in ("import transformers.models", "from graftwork.images import decode", "from graftwork import texts"):
        assert imported(ast.parse(line)), line
    assert not asked(ast.parse('modality = info.get("modality", "image")'))


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_modality_has_every_part(modality: str) -> None:
    """A part that one lacks is a crash in the step that asks for it."""
    assert MODALITIES[modality].keys() == MODALITIES["image"].keys()


@pytest.mark.parametrize(
    "module",
    ["graftwork.pipelines.cli", *MODALITIES["image"].values(), "graftwork.features", "graftwork.finetune",
     "graftwork.evaluate", "graftwork.register", "graftwork.predicting", "graftwork.serving", "graftwork.validate"],
)  # fmt: skip
def test_an_image_run_imports_nothing_of_texts(module: str) -> None:
    """transformers takes seconds to import, in each of eight steps, and may not be installed."""
    code = f"import sys, {module}; print(*[m for m in ('transformers', 'tokenizers', 'datasketch', 'ftfy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
