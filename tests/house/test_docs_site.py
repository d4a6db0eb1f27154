"""The pages of the documentation: their code runs, their messages are those of the code, and they build."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import hap_hf
from hap_hf import HapConfig, HessianPruner, known_criteria
from hap_hf.checkpoint.entry import QUANT_METHOD

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    ROOT / "hap_hf" / "discovery" / "README.md",
    ROOT / "hap_hf" / "curvature" / "README.md",
]

_BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)\n-->"
    r"|(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n)?```python\n(?P<code>.*?)```"
    r"|```text\n(?P<message>[^`]*?)\n```\n\n(?:<!-- raises\n(?P<raising>.*?)\n-->|<!-- said in: (?P<file>\S+) -->)",
    re.S,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft's own use
)


def _name(page):
    return str(page.relative_to(ROOT))


def _compiled(page, text, match, group):
    """Return the code of a block, whose tracebacks name the page and the line."""
    line = text.count("\n", 0, match.start(group))
    return compile("\n" * line + match[group], _name(page), "exec")


@pytest.fixture
def registries(monkeypatch):
    """Let nothing that an example registers outlive it."""
    for register in (
        hap_hf.register_criterion,
        hap_hf.register_layer,
        hap_hf.register_currency,
        hap_hf.register_counter,
    ):
        module = sys.modules[register.__module__]
        tables = [name for name, value in vars(module).items() if name.isupper() and type(value) is dict]
        assert tables
        for name in tables:
            monkeypatch.setattr(module, name, dict(getattr(module, name)))


def _pages_with(group):
    found = [page for page in PAGES if any(m[group] for m in _BLOCK.finditer(page.read_text(encoding="utf-8")))]
    return pytest.mark.parametrize("page", found, ids=_name)


@_pages_with("code")
@pytest.mark.usefixtures("registries")
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__page__"}
    for match in _BLOCK.finditer(text):
        if match["reason"]:
            ast.parse(match["code"])
        elif match["setup"] or match["code"]:
            exec(_compiled(page, text, match, "setup" if match["setup"] else "code"), names)


def test_only_code_of_other_libraries_is_not_run():
    reasons = [m["reason"] for page in PAGES for m in _BLOCK.finditer(page.read_text(encoding="utf-8")) if m["reason"]]
    assert len(reasons) == 3
    assert all("needs" in reason or "transformers 5 has no" in reason for reason in reasons)


def _matches(said, message):
    """Return whether a message is what a page says, where ``…`` stands for anything."""
    words = [re.escape(" ".join(part.split())) for part in said.split("…")]
    return re.fullmatch(".*".join(words), " ".join(message.split())) is not None


@_pages_with("raising")
def test_a_mistake_is_answered_by_the_message_that_the_page_quotes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    text, names, wrong = page.read_text(encoding="utf-8"), {"__name__": "__page__"}, []
    for match in _BLOCK.finditer(text):
        if match["setup"]:
            exec(_compiled(page, text, match, "setup"), names)
        if match["raising"]:
            try:
                exec(_compiled(page, text, match, "raising"), dict(names))
                answer = "nothing"
            except (hap_hf.HapError, TypeError) as error:
                answer = f"{type(error).__name__}: {error}"
            if not _matches(match["message"], answer):
                wrong.append(f"the page says\n{match['message']}\nand the code\n{answer}\n")
    assert not wrong, "\n".join(wrong)


def _texts(path):
    """Return every text in a module, with ``…`` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@_pages_with("file")
def test_messages_that_take_a_machine_to_raise_stand_in_the_code(page):
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["file"]:
            texts = list(_texts(ROOT / match["file"]))
            said = re.sub(r"^\w+Error: ", "", " ".join(match["message"].split()))
            for part in filter(None, (p.strip() for p in said.split("…"))):
                assert any(part in text for text in texts), f"{match['file']} does not say {part!r}"


def test_every_message_of_the_troubleshooting_page_is_checked():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    checked = [m for m in _BLOCK.finditer(text) if m["message"]]
    assert len(checked) >= 40
    assert text.count("```text\n") - len(checked) == 1  # that of transformers, for which the next test is


def test_the_documents_quote_what_transformers_says_without_hap_hf():
    """That it says so is the business of tests/checkpoint/test_checkpoint.py."""
    for page in (ROOT / "README.md", DOCS / "checkpoints-and-the-hub.md", DOCS / "troubleshooting.md"):
        assert f"Unknown quantization type, got {QUANT_METHOD}" in page.read_text(encoding="utf-8")


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_what_the_code_says_now():
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert _module(DOCS / "gen_settings.py").page() == page, "run python docs/gen_settings.py"
    for name in HapConfig.help():
        assert f"\n| `{name}` |" in page
    for name in list(inspect.signature(HessianPruner.__init__).parameters)[1:]:
        assert f"\n| `{name}` |" in page
    for name, criterion in known_criteria().items():
        assert f"\n| `{name}` | `{criterion.__name__}` |" in page


def test_every_public_name_has_an_entry_and_every_entry_a_name():
    entries = re.findall(r"^::: hap_hf\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(entries) == sorted(set(hap_hf.__all__) - {"__version__"})


def test_charts_show_the_numbers_of_the_tables():
    draw = _module(DOCS / "figures" / "draw.py")
    text = (DOCS / "measured.md").read_text(encoding="utf-8")
    for name, numbers in (("accuracy", draw.accuracy_numbers(text)), ("latency", draw.latency_numbers(text))):
        drawn = ElementTree.parse(DOCS / "figures" / f"{name}.svg").iter(
            "{http://purl.org/dc/elements/1.1/}description"
        )
        assert json.loads(next(drawn).text) == numbers, "run python docs/figures/draw.py"
    assert f"gives {draw.ONE_ANSWER}" in text


def test_every_figure_is_drawn_by_the_script_and_shown(tmp_path):
    _module(DOCS / "figures" / "draw.py").draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "figures").glob("*.svg")}
    shown = {name for page in PAGES for name in re.findall(r"figures/(\w+\.svg)", page.read_text(encoding="utf-8"))}
    assert shown == drawn


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(hap_hf.__all__) - {"__version__"}:
        assert f'id="hap_hf.{name}"' in api
    assert not re.search(r":(?:class|func|meth|mod):", api)
