"""What the documents say exists and runs."""

import ast
import doctest
import importlib
import json
import pkgutil
import re
from functools import partial
from pathlib import Path

import pytest
import quickstart

import hap_hf

ROOT = Path(__file__).parents[2]
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(f for f in ROOT.glob("*/**/*.md") if ".venv" not in f.parts)]
DOCUMENTS = sorted(str(f.relative_to(ROOT)) for f in WRITTEN if not any(p.startswith(".") for p in f.parts))
MODULES = [m.name for m in pkgutil.walk_packages(hap_hf.__path__, "hap_hf.")]


def text_of(document):
    return (ROOT / document).read_text(encoding="utf-8")


def python_in(document):
    return re.findall(r"```python\n(.*?)```", text_of(document), flags=re.S)


def test_the_quickstart_prunes_half_of_the_encoder_and_reloads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "latencies", partial(quickstart.latencies, repeats=1))  # a clock is not tested
    results = quickstart.main([
        *("--output_dir", str(tmp_path), "--epochs", "2", "--recovery_epochs", "1"),
    ])
    dense, pruned = results["dense"], results["pruned"]
    assert 0.49 < pruned["encoder_params"] / dense["encoder_params"] < 0.51
    assert pruned["macs"] < 0.6 * dense["macs"]
    assert 0.2 < pruned["accuracy"] <= 1
    assert "implants" in (tmp_path / "pruning_report.md").read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "pruned" / "config.json").read_text(encoding="utf-8"))
    assert saved["quantization_config"]["quant_method"] == "hap_hf"
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_some_docstring_has_an_example():
    assert sum(doctest.testmod(importlib.import_module(n)).attempted for n in MODULES) > 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_the_documents_parses_and_names_public_things(document):
    for block in python_in(document):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hap_hf":
                assert {alias.name for alias in node.names} <= set(hap_hf.__all__)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hap_hf."):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


def test_there_is_python_in_the_readme():
    assert python_in("README.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_public_names_in_the_documents_exist(document):
    for name in re.findall(r"\bhap_hf\.([A-Za-z_]+)\(", text_of(document)):
        assert name in hap_hf.__all__, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_in_the_documents_exist(document):
    paths = re.findall(r"(?<![\w/.])(?:examples|notebooks|tests|docs|\.ci)/[\w./-]*\w", text_of(document))
    assert paths or document not in {"README.md", "CONTRIBUTING.md"}
    for path in paths:
        assert (ROOT / path).exists(), f"{document} names {path}"


def headings(document):
    """Return the anchors that GitHub makes of headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(document), flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_in_the_documents_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(str(target.resolve().relative_to(ROOT))), f"{document} links to {link}"


def test_every_row_of_the_trainer_page_names_tests_that_exist():
    tables = text_of("docs/in-the-trainer.md").partition("## What works with what")[2]
    rows = [row for row in tables.splitlines() if row.startswith("| ") and not row.startswith("| with |")]
    existing = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)
    }
    assert len(rows) > 40
    for row in rows:
        named = set(re.findall(r"\btest_\w+", row))
        assert named, f"no test holds {row!r}"
        assert named <= existing, named - existing


def test_the_readme_is_short_and_says_what_people_stumble_over():
    text = text_of("README.md")
    assert text.count("\n") <= 140
    for needed in (
        "prunable part",
        "`prune_ratio` cuts",
        "keep",
        "optimizer=optimizer",
        "got hap_hf",
        "requirements.lock",
    ):
        assert needed in text
