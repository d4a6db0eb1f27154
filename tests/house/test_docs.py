"""What the documents say exists and runs."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import quickstart

import hap_hf

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = [m.name for m in pkgutil.walk_packages(hap_hf.__path__, "hap_hf.")]


def test_the_quickstart_prunes_half_of_the_encoder_and_reloads(tmp_path, capsys):
    results = quickstart.main([
        *("--output_dir", str(tmp_path), "--epochs", "2", "--recovery_epochs", "1"),
    ])
    dense, pruned = results["dense"], results["pruned"]
    assert 0.49 < pruned["encoder_params"] / dense["encoder_params"] < 0.51
    assert pruned["macs"] < 0.6 * dense["macs"]
    assert 0.2 < pruned["accuracy"] <= 1
    assert "implants" in (tmp_path / "pruning_report.md").read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "pruned" / "config.json").read_text(encoding="utf-8"))
    assert saved["quantization_config"]["quant_method"] == "hap"
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_some_docstring_has_an_example():
    assert sum(doctest.testmod(importlib.import_module(n)).attempted for n in MODULES) > 0


def test_python_in_the_readme_parses_and_names_public_things():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hap_hf":
                assert {alias.name for alias in node.names} <= set(hap_hf.__all__)


def test_public_names_in_the_readme_exist():
    for name in re.findall(r"hap_hf\.([A-Za-z_]+)\(", README):
        assert name in hap_hf.__all__, name


def test_files_in_the_documents_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        paths = re.findall(r"(?:examples|notebooks|tests|\.ci)/[\w./-]*\w", text)
        assert paths
        for path in paths:
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+)`", README))
    existing = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 20
    assert named <= existing, named - existing
