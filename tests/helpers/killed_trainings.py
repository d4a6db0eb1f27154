"""Trainings that end by SIGKILL, each in a process of its own; run as a script with a folder for their checkpoints."""

import os
import signal
import sys
from pathlib import Path

import torch
from trainings import config, make_trainer, tiny_model
from transformers import Trainer, TrainerCallback

import hap_hf.cut
from hap_hf import HessianPruner

LAST_CHECKPOINTS = {
    "before the first round": 2,
    "while scoring": 2,
    "during surgery": 2,
    "between the rounds": 4,
    "while scoring again": 6,
    "while writing the report": 6,
    "while saving": 6,
    "after the last round": 8,
}
"""The last whole checkpoint by when the training is killed."""


def new_pruner():
    """Return a callback with rounds after steps 4 and 7, the second one with implants."""
    return HessianPruner(config(prune_ratio=0.5, implant_ratio=0.5, method="taylor"), step=4, num_rounds=2, interval=3)


def new_trainer(folder, *callbacks, model=None, **changes):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 2, **changes}
    return make_trainer(folder, model or tiny_model(), *(callbacks or [new_pruner()]), **settings)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def die_on_call(number, function, applies=lambda *args: True):
    """Return ``function``, deadly when it is called for the given time with arguments that it applies to."""
    calls = []

    def deadly(*args, **kwargs):
        calls.extend([1] if applies(*args) else [])
        if len(calls) == number:
            die()
        return function(*args, **kwargs)

    return deadly


def train(folder, when):
    callbacks = [new_pruner()]
    if when == "before the first round":
        callbacks.append(DieAfterStep(3))
    elif when == "between the rounds":
        callbacks.append(DieAfterStep(5))
    elif when == "after the last round":
        callbacks.append(DieAfterStep(9))
    elif when == "during surgery":
        hap_hf.cut.carry_optimizer_state_ = die_on_call(1, None)
    elif when == "while writing the report":  # of the second round; the first one writes four files
        Path.replace = die_on_call(5, Path.replace, lambda file, _: file.name.startswith("pruning_report"))
    elif when == "while saving":
        torch.save = die_on_call(1, torch.save, lambda _, file: str(file).endswith("checkpoint-8/optimizer.pt"))
    else:
        step = {"while scoring": 4, "while scoring again": 7}[when]
        Trainer.compute_loss = die_on_call(
            2, Trainer.compute_loss, lambda own, model, *_: not model.training and own.state.global_step == step
        )
    new_trainer(folder, *callbacks).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for when in LAST_CHECKPOINTS:
        child = os.fork()
        if child == 0:
            train(Path(sys.argv[1]) / when, when)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the training that was to be killed {when} ended with status {status}")
