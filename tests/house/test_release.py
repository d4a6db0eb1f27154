"""What a release says of itself, and what its wheel has."""

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import hap_hf
from hap_hf.version import __version__

ROOT = Path(hap_hf.__file__).parents[1]
PACKAGE = ROOT / "hap_hf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel offline, from a copy, as setuptools leaves its own folders where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "hap_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()  # a second package beside the one, which must stay out
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield file.name, {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_has_the_package_whole_and_nothing_else(wheel):
    name, files = wheel
    assert name == f"hap_hf-{__version__}-py3-none-any.whl"
    own = {
        str(p.relative_to(ROOT))
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".md"
    }
    assert {"hap_hf/py.typed", "hap_hf/page/page.html"} <= own
    described = {n for n in files if n.startswith(f"hap_hf-{__version__}.dist-info/")}
    assert set(files) - described == own


def test_the_wheel_says_its_version_its_license_and_its_command(wheel):
    _, files = wheel
    info = f"hap_hf-{__version__}.dist-info"
    said = email.message_from_bytes(files[f"{info}/METADATA"])
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("hap_hf", __version__, "Apache-2.0")
    assert "Typing :: Typed" in said.get_all("Classifier")
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert files[f"{info}/entry_points.txt"].decode().split() == [
        "[console_scripts]",
        "hap-hf",
        "=",
        "hap_hf.cli.app:main",
    ]
    # What is needed without extras is what the package imports at its import.
    needed = {re.match(r"[\w-]+", r)[0] for r in said.get_all("Requires-Dist") if "extra ==" not in r}
    assert needed == {"accelerate", "rich", "safetensors", "torch", "transformers", "typer"}


def test_version_changelog_and_citation_agree():
    versions = re.findall(r"^## \[([\d.]+)\]( - \d{4}-\d\d-\d\d)?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (newest, date), *_ = versions
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == __version__ == cited["version"]
    assert date.removeprefix(" - ") == str(cited["date-released"])
    assert [tuple(map(int, v.split("."))) for v, _ in versions] == sorted(
        (tuple(map(int, v.split("."))) for v, _ in versions), reverse=True
    )
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    papers = {reference["url"] for reference in cited["references"]}
    assert all(url in (ROOT / "README.md").read_text() for url in papers)
