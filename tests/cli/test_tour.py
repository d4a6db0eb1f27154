"""The commands of the documentation run, in their order."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from on_disk import save_data, save_model
from typer.testing import CliRunner

from hap_hf.cli.app import app

PAGES = Path(__file__).parents[2] / "docs"


def blocks_of_commands(page):
    """Return the commands of each block that has some."""
    blocks = re.findall(r"```bash\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), flags=re.S)
    lines = [[line for line in block.splitlines() if line.startswith("hap-hf ")] for block in blocks]
    return [[shlex.split(line, comments=True)[1:] for line in block] for block in lines if block]


def test_the_three_commands_of_the_tour_leave_a_checkpoint_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("text-classification", "my-fine-tuned-bert")
    save_data("text-classification", ".")
    tour = blocks_of_commands("command-line.md")[0]
    assert len(tour) == 3
    for words in tour:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}: {done.output} {done.exception!r}"
    assert {"config.json", "model.safetensors", "pruning_report.json", "heads.png", "README.md"} <= {
        file.name for file in Path("smaller").iterdir()
    }
    assert Path("tried/sweep.html").is_file()


@pytest.mark.parametrize("page", ["index.md", "../README.md"])
def test_every_tour_is_the_same(page):
    assert blocks_of_commands(page)[0] == blocks_of_commands("command-line.md")[0]


def test_other_commands_of_the_page_have_flags_that_exist():
    group = typer.main.get_command(app)
    others = [words for block in blocks_of_commands("command-line.md")[1:] for words in block]
    assert others
    for name, *words in others:
        group.commands[name].make_context(name, words)
    with pytest.raises(Exception, match="No such option"):
        group.commands[name].make_context(name, [*words, "--no-such-flag"])


def shown(monkeypatch, *words):
    """Return the help of a command as it stands in a window of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


@pytest.mark.parametrize("name", ["", *sorted(typer.main.get_command(app).commands)])
def test_the_help_fits_a_screen(name, monkeypatch):
    lines = shown(monkeypatch, *filter(None, [name]))
    assert 10 < len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_what_the_help_leaves_out_is_in_the_long_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert len(CliRunner().invoke(app, ["prune", "--help-all"]).output.splitlines()) > 40


def test_every_command_of_the_page_exists():
    named = set(re.findall(r"`hap-hf (\w+)", (PAGES / "command-line.md").read_text(encoding="utf-8")))
    known = {command.callback.__name__ for command in app.registered_commands}
    assert named == known
