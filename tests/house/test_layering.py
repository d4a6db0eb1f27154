"""The layers of the package, and that importing it stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hap_hf

PACKAGE = Path(hap_hf.__file__).parent
LAYERS = [
    {"errors", "host", "version", "cifar"},
    {"names"},
    {"layers"},
    {"model"},
    {"curvature"},
    {"evidence"},
    {"surgery"},
    {"discovery"},
    {"inputs"},
    {"criteria"},
    {"config"},
    {"arguments", "compensation"},
    {"reconstruction"},
    {"selection", "report"},
    {"decision"},
    {"checkpoint"},
    {"bits"},
    {"admission"},
    {"cut", "bypassing"},
    {"pipeline"},
    {"planned", "floor", "file_size", "similarity"},
    {"tradeoff"},
    {"plots", "page"},
    {"card"},
    {"trainer", "export"},
    {"cli"},
    {"__main__"},
    {"__init__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MAY_IMPORT_TRANSFORMERS = {"checkpoint", "card", "trainer", "cli"}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path):
    """Return the top-level module or folder that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "hap_hf":
            yield from (f"hap_hf.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports hide the layer"
            yield node.module


def test_every_module_has_a_layer():
    assert {unit_of(p) for p in FILES} == set(LEVEL)
    assert sum(map(len, LAYERS)) == len(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_layers(path):
    unit = unit_of(path)
    for name in imports_of(path):
        if name.startswith("hap_hf."):
            other = name.split(".")[1]
            assert other in LEVEL, f"{unit} must not import {name} from the face of the package"
            assert other == unit or LEVEL[other] < LEVEL[unit], f"{unit} must not import {other}"
        if name.split(".")[0] == "transformers":
            assert unit in MAY_IMPORT_TRANSFORMERS, f"{unit} must not import transformers"


def test_curvature_knows_no_group_and_surgery_no_score():
    for path in (PACKAGE / "curvature").rglob("*.py"):
        assert not {"hap_hf.names.group", "hap_hf.names.plan"} & set(imports_of(path))
    for path in (PACKAGE / "surgery").rglob("*.py"):
        assert not {"hap_hf.criteria", "hap_hf.discovery"} & {".".join(n.split(".")[:2]) for n in imports_of(path)}


def test_names_and_numbers_import_no_torch():
    files = [PACKAGE / "errors.py", *(PACKAGE / "names").rglob("*.py")]
    assert len(files) > 5
    for path in files:
        assert not any(n.split(".")[0] == "torch" for n in imports_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_grows_past_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_importing_stays_light():
    heavy = ["torchvision", "datasets", "matplotlib", "evaluate", "peft", "sklearn", "scipy", "onnx", "onnxruntime"]
    # transformers itself pulls some of these in; only what the import of hap_hf adds counts.
    code = (
        "import sys, transformers, transformers.trainer; before = set(sys.modules); import hap_hf; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_exist_and_are_listed_once():
    assert len(hap_hf.__all__) == len(set(hap_hf.__all__))
    for name in hap_hf.__all__:
        assert getattr(hap_hf, name) is not None
