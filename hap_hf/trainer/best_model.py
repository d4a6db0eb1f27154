"""What training remembers as best so far, once the model has become another."""

import math

from transformers import TrainerState

from hap_hf.trainer.host import forget_averages_


def forget_best_(state: TrainerState, scheduler: object) -> None:
    """Let the search for the best model begin anew with the pruned one.

    A checkpoint from before does not fit the smaller model, so it must not be loaded into it at the end. Nor must its
    metric win against the smaller model's, or count as a lack of progress: ``EarlyStoppingCallback`` starts counting
    at the first evaluation for which no best metric is known, and a learning rate that falls on plateaus does so, too.

    Args:
        state: The Trainer's state.
        scheduler: Its learning rate scheduler.
    """
    state.best_metric = None
    state.best_global_step = None  # from which the Trainer finds the best checkpoint again at the next save
    state.best_model_checkpoint = None
    watched = vars(scheduler) if hasattr(scheduler, "num_bad_epochs") else {}
    if {"best", "mode"} <= watched.keys():  # ReduceLROnPlateau and GreedyLR
        watched["best"] = math.inf if watched["mode"] == "min" else -math.inf
        watched["num_bad_epochs"] = 0
    forget_averages_(scheduler)
