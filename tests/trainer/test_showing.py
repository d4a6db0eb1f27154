"""What a round did is in the Trainer's trackers and in TensorBoard, and is one line in the console."""

import json
import logging

import pytest
import transformers as hf
from trainings import config, make_trainer, tiny_model
from transformers.integrations import TensorBoardCallback

from hap_hf import HessianPruner, plan_of

pytestmark = pytest.mark.fast


class Tracker(hf.TrainerCallback):
    """What stands for W&B or trackio: it gets what the Trainer logs."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


class Writer:
    def __init__(self, error=None):
        self.figures, self.scalars, self.error = [], {}, error

    def add_figure(self, tag, figure, global_step):
        if self.error is not None:
            raise self.error
        self.figures.append((tag, type(figure).__name__, global_step))

    def add_scalar(self, tag, value, global_step):
        self.scalars[tag] = value

    def add_text(self, *args): ...

    def flush(self): ...

    def close(self): ...


class Board(TensorBoardCallback):
    """TensorBoard's callback without TensorBoard, which is no dependency."""

    def __init__(self, writer):
        self._SummaryWriter, self.tb_writer, self.logging_dir = None, writer, None


def trained(tmp_path, *others, **given):
    pruner = HessianPruner(**{"config": config(), "step": 1, **given})
    trainer = make_trainer(tmp_path, tiny_model(), *others, pruner, max_steps=2)
    trainer.train()
    return trainer, pruner.reports[0]


def test_trackers_get_kept_shares_sensitivities_losses_and_seconds(tmp_path):
    tracker = Tracker()
    trainer, report = trained(tmp_path, tracker)
    (entry,) = [(step, logs) for step, logs in tracker.entries if "prune_params" in logs]
    step, logs = entry
    assert step == 1
    assert logs.items() <= next(e for e in trainer.state.log_history if "prune_params" in e).items()
    shown = {name: value for name, value in logs.items() if name.startswith("hap/")}
    assert json.loads(json.dumps(shown)) == shown
    expected = {"hap/loss/before": report.loss_before, "hap/loss/after": report.loss_after}
    expected |= {f"hap/seconds/{name}": value for name, value in report.seconds.items()}
    kept = {"heads": [0, 0], "ffn": [0, 0]}
    for group in plan_of(trainer.model):
        module, kind = group.group.name.split(":")
        numbers = group.actions.count("k"), len(group.actions)
        kept[kind] = [a + b for a, b in zip(kept[kind], numbers, strict=True)]
        expected[f"hap/kept/{module}/{kind}"] = numbers[0] / numbers[1]
        values = report.scores.sensitivity[group.group.name].tolist()
        expected[f"hap/sensitivity/{module}/{kind}/mean"] = pytest.approx(sum(values) / len(values))
        expected[f"hap/sensitivity/{module}/{kind}/least"] = min(values)
    expected |= {f"hap/kept/{kind}": a / b for kind, (a, b) in kept.items()}
    assert shown == expected
    assert 0 < shown["hap/kept/ffn"] < 1


def test_a_given_plan_has_no_sensitivities_to_show(tmp_path):
    trainer, _ = trained(tmp_path)
    tracker = Tracker()
    trained(tmp_path, tracker, plan=plan_of(trainer.model))
    (logs,) = [logs for _, logs in tracker.entries if "prune_params" in logs]
    assert any(name.startswith("hap/kept/bert") for name in logs)
    assert not any("sensitivity" in name for name in logs)


def test_the_console_shows_a_round_as_one_line(tmp_path, capsys):
    _, report = trained(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "prune" in line] == [report.summary]
    assert any("'loss'" in line for line in lines)  # the control: what else is logged is printed as ever


def test_tensorboard_gets_the_pictures(tmp_path):
    writer = Writer()
    trained(tmp_path, Board(writer))
    assert writer.figures == [(f"hap/{name}", "Picture", 1) for name in ("widths", "threshold", "heads")]
    assert "train/hap/kept/heads" in writer.scalars


@pytest.mark.parametrize("missing", ["matplotlib", "room on the disk"])
def test_without_pictures_the_training_goes_on(missing, tmp_path, monkeypatch, caplog):
    writer = Writer(OSError("no space left") if missing != "matplotlib" else None)
    if missing == "matplotlib":
        monkeypatch.setattr("hap_hf.trainer.showing.importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="hap_hf"):
        trainer, _ = trained(tmp_path, Board(writer))
    assert trainer.state.global_step == 2
    assert not writer.figures
    assert ("no pictures in TensorBoard: OSError" in caplog.text) == (missing != "matplotlib")
