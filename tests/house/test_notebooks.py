"""The course: notebooks run from top to bottom, and are kept with what they print and draw."""

import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST, OTHERS = NOTEBOOKS[0], NOTEBOOKS[1:]


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def test_the_first_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(read(FIRST), timeout=300, kernel_name="python3", resources=resources).execute()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.name)
def test_the_others_run_in_this_process(path, tmp_path, monkeypatch):
    # Where everything is imported already, which is half of the time of a kernel.
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    drawn = 0
    for cell in code_of(path):
        with capture_output():
            result = shell.run_cell(cell.source)
        result.raise_error()
        if hasattr(result.result, "_repr_png_"):
            assert result.result._repr_png_().startswith(b"\x89PNG")
            drawn += 1
    assert drawn == sum("image/png" in data for data in kept(path))


def kept(path):
    """Yield the data of what the cells of a notebook showed when it was saved."""
    for cell in code_of(path):
        yield from (output.data for output in cell.outputs if "data" in output)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_kept_with_its_pictures_and_nothing_of_a_machine(path):
    cells = code_of(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run notebooks/run.py"
    assert any("image/png" in data for data in kept(path))
    assert path.stat().st_size < 200_000
    printed = "".join(
        o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for c in cells for o in c.outputs
    )
    assert not re.search(r"/(tmp|home|root|Users|work)/|Warning|Traceback", printed)
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)


def test_each_begins_with_what_its_reader_wants_and_leads_to_the_next():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]
    for path, following in zip(NOTEBOOKS, [*NOTEBOOKS[1:], None], strict=True):
        cells = read(path).cells
        title, _, rest = cells[0].source.partition("\n\n")
        assert title.startswith(f"# {path.name[0]}. ")
        assert re.match(r"You|Your", rest)
        for link in re.findall(r"\]\(([^)#]+)", "".join(c.source for c in cells if c.cell_type == "markdown")):
            assert (path.parent / link).is_file(), f"{path.name} links to {link}"
        assert following is None or f"]({following.name})" in cells[-1].source
