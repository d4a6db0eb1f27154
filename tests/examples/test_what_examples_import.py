"""Examples use the package as a stranger would."""

import ast
from pathlib import Path

import pytest

import hap_hf

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.rglob("*.py"))
OPEN_MODULES = {"hap_hf", "hap_hf.arguments"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_only_public_names_are_imported(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "sys.path" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {a.name for a in node.names if a.name.split(".")[0] == "hap_hf"} <= OPEN_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hap_hf":
            assert node.module in OPEN_MODULES
            assert node.module != "hap_hf" or {alias.name for alias in node.names} <= set(hap_hf.__all__)


def test_scripts_beside_benchmarks_need_no_other_file() -> None:
    own = {file.stem for file in FILES}
    for file in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not own & set(names)
