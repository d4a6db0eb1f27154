"""The commands of the documentation run, in their order."""

import re
import shlex
from pathlib import Path

from on_disk import save_data, save_model
from typer.testing import CliRunner

from hap_hf.cli.app import app

PAGES = Path(__file__).parents[2] / "docs"


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("hap-hf ")]
    return [shlex.split(line)[1:] for line in lines]


def test_the_three_commands_of_the_tour_leave_a_checkpoint_and_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("text-classification", "my-fine-tuned-bert")
    save_data("text-classification", ".")
    tour = commands("command-line.md")
    assert len(tour) == 3
    for words in tour:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}: {done.output} {done.exception!r}"
    assert {"config.json", "model.safetensors", "pruning_report.json", "heads.png", "README.md"} <= {
        file.name for file in Path("smaller").iterdir()
    }
    assert Path("tried/sweep.png").is_file()


def test_every_command_of_the_page_exists():
    named = set(re.findall(r"`hap-hf (\w+)", (PAGES / "command-line.md").read_text(encoding="utf-8")))
    known = {command.callback.__name__ for command in app.registered_commands}
    assert named == known
