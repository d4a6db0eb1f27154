"""A place that cannot be written to is refused before anything is loaded."""

import tempfile

import pytest
from typer.testing import CliRunner

from hap_hf.cli.app import app

COMMANDS = {
    "prune": ["prune", "no-such-model", "--data", "digits"],
    "sweep": ["sweep", "no-such-model", "--data", "digits"],
    "vanilla": ["vanilla", "no-such-model"],
    "export": ["export", "no-such-model", "--format", "pt2"],
    "plot": ["plot", "{folder}/drawn"],
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, and one with something to draw."""
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "sweep.json").write_text("{}", encoding="utf-8")
    return tmp_path


def run(name, folder, out):
    end = "/x.pt2" if name == "export" else ""
    words = [word.format(folder=folder) for word in COMMANDS[name]]
    return CliRunner().invoke(app, [*words, "--out", out + end if out else out])


@pytest.mark.parametrize("below", ["", "/a/b"])
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_folder_is_made_in_place_of_a_file(name, below, folder):
    done = run(name, folder, f"{folder}/file{below}")
    assert done.exit_code == 1, done.output + repr(done.exception)
    assert f"{folder}/file is none; choose another" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (folder / "file").read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_folder_that_may_not_be_written_to_is_told(name, folder, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    done = run(name, folder, f"{folder}/new")
    assert done.exit_code == 1, done.output + repr(done.exception)
    assert "cannot be written to: Permission denied; choose another" in done.stderr
    assert not (folder / "new").exists()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_an_empty_name_is_a_wrong_use(name, folder):
    done = run(name, folder, "")
    assert done.exit_code == 2, done.output + repr(done.exception)
    assert "expected a path, got an empty text" in done.stderr


@pytest.mark.parametrize("name", ["prune", "vanilla"])
def test_the_model_is_not_overwritten(name, folder):
    words = [str(folder / "drawn") if word == "no-such-model" else word for word in COMMANDS[name]]
    done = CliRunner().invoke(app, [*words, "--out", str(folder / "drawn")])
    assert done.exit_code == 1
    assert "is the folder of the model, which would be overwritten" in done.stderr
