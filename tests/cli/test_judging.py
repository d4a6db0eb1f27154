"""What training leaves is judged by numbers only, and what is printed is the result only."""

import json
from types import SimpleNamespace

import pytest
import torch
from on_disk import save_data, save_model
from typer.testing import CliRunner

from hap_hf.cli.app import app
from hap_hf.cli.tasks import TASKS, share_of_right
from hap_hf.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_data("text-classification", folder)
    return save_model("text-classification", folder / "bert")


def prune(model, out, *words):
    quick = ["--max-batches", "1", "--eval-samples", "8", "--method", "taylor", "--epochs", "0.2"]
    given = ["--data", str(model.parent / "train.csv"), "--out", str(out), *quick, *words]
    return CliRunner().invoke(app, ["prune", str(model), *given])


def test_json_is_json_with_training_too(model, tmp_path):
    done = prune(model, tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "after training" in json.loads(done.stdout)["results"]
    assert "train_runtime" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "1e30"], "training with --learning-rate 1e+30 left"),
        (["--learning-rate", "0"], "expected finite numbers for --epochs and --learning-rate"),
        (["--epochs", "inf"], "expected finite numbers for --epochs and --learning-rate"),
    ],
)
def test_a_training_that_leaves_no_numbers_leaves_no_files(words, message, model, tmp_path):
    done = prune(model, tmp_path / "out", *words)
    assert done.exit_code == 1, done.output + repr(done.exception)
    assert message in done.stderr
    assert not done.stdout
    assert not (tmp_path / "out").exists()


class Answering(torch.nn.Module):
    """A model that gives the same outputs to all."""

    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(value))

    def forward(self, labels, **others):
        logits = torch.stack([self.weight.expand(2, 3), torch.zeros(2, 3)], -1)
        return SimpleNamespace(logits=logits, start_logits=logits[..., 0], end_logits=logits[..., 0])


@pytest.mark.parametrize("task", ["token-classification", "text-generation", "question-answering"])
def test_outputs_that_are_no_numbers_are_no_answers(task):
    places = {f"{end}_positions": torch.zeros(2, dtype=torch.long) for end in ("start", "end")}
    batch = {"labels": torch.zeros(2, 3, dtype=torch.long), **places}
    assert share_of_right(TASKS[task], Answering(1.0), [batch]) == 1
    with pytest.raises(ConfigError, match="the model's outputs are NaN"):
        share_of_right(TASKS[task], Answering(float("nan")), [batch])


def test_no_label_is_no_accuracy():
    with pytest.raises(ConfigError, match="have no label that the model sees"):
        share_of_right(TASKS["token-classification"], Answering(1.0), [{"labels": torch.full((2, 3), -100)}])
