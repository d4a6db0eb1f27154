"""One scoring, many amounts: what accuracy is left at which size."""

import copy
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.decision import Decision
from hap_hf.errors import ConfigError
from hap_hf.evidence.batches import Batch, call, move_to_model
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.evidence.mean import mean_loss
from hap_hf.evidence.progress import job, part
from hap_hf.model.state import preserved
from hap_hf.names.actions import PRUNE, encode_actions
from hap_hf.names.amount import Amount
from hap_hf.names.group import Group, Kind
from hap_hf.pipeline import carry_out_, decide, decide_again
from hap_hf.selection.passes import num_parts
from hap_hf.tradeoff.values import LOSS, Tradeoff, TradeoffGroup, TradeoffPoint

_PARTS = 3
"""Of the job for each amount: what its repair, its loss and its judge take."""
_FEWEST, _MOST, _SECONDS = 7, 50, 0.1
"""Turns that are taken at least; more while they are short, as a busy machine slows whole stretches of them."""


def measure_tradeoff(
    model: nn.Module,
    batches: Iterable[Any],
    config: HapConfig,
    keeps: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    metric: str = "accuracy",
    loss_fn: LossFunction | None = None,
    timed: bool = True,
) -> Tradeoff:
    """Measure what several amounts would leave; the model is left as found, and scored once.

    Units are scored on the way to the smallest amount. With a criterion that scores in several passes the larger ones
    may come out a little different from what :func:`hap_hf.prune` would do for each alone.

    Args:
        model: A trained model.
        batches: Batches with labels to score on.
        config: How to prune; its amount says what the shares are of.
        keeps: Shares of the prunable part to keep.
        evaluate: Returns the metric of a model, a larger one is better; by default the loss on the batches is taken.
        metric: What ``evaluate`` returns.
        loss_fn: Loss of a model on a batch; by default the model's own.
        timed: Whether to measure the time of a batch.

    Returns:
        The dense model and each amount.

    Raises:
        ConfigError: If a share is out of range, or an amount cannot be reached.
    """
    wanted = sorted(set(keeps), reverse=True)
    if not wanted or not all(0 < keep < 1 for keep in wanted):
        raise ConfigError(f"expected shares to keep in (0, 1), got {list(keeps)}; 0.5 keeps half")
    settings = [_asking(config, keep) for keep in wanted]
    evidence = settings[-1].evidence(model, batches, loss_fn=loss_fn)
    parts = num_parts(settings[-1]) + _PARTS * len(settings)
    with job("trying amounts", parts, shown=evidence.progress):
        decision = decide(evidence, settings[-1])
        loss = decision.loss if decision.loss is not None else mean_loss(evidence)
        value = _judged(evaluate, model, evidence) if evaluate else loss
        points, pairs = [TradeoffPoint(1.0, decision.before.params, decision.before.macs, loss, value)], []
        for asked in settings:
            again, pruned = decide_again(decision, asked), copy.deepcopy(model)
            report = carry_out_(pruned, again)
            loss = report.loss_after if report.loss_after is not None else mean_loss(replace(evidence, model=pruned))
            points.append(
                TradeoffPoint(
                    asked.asked.keep,
                    report.after.params,
                    report.after.macs,
                    loss,
                    _judged(evaluate, pruned, evidence) if evaluate else loss,
                    predicted=_predicted(again),
                    actions={g.group.name: encode_actions(g.actions) for g in again.stage},
                )
            )
            if timed:
                pairs.append(milliseconds((model, pruned), evidence.example))
    if timed:
        points = [replace(p, milliseconds=t) for p, t in zip(points, _comparable(pairs), strict=True)]
    groups = tuple(_scored(group, decision.scores) for group in decision.discovery.groups)
    counted_in = config.asked.what.name
    machine = f"{platform.machine()}, threads: {torch.get_num_threads()}" if timed else ""
    if evaluate:
        return Tradeoff(tuple(points), metric, True, counted_in, machine, groups)
    return Tradeoff(tuple(points), LOSS, False, counted_in, machine, groups)


def _scored(group: Group, scores: Scores) -> TradeoffGroup:
    """Return a group with the sensitivities of its units, where they are heads."""
    known = group.kind is Kind.HEADS and group.name in scores.sensitivity
    values = [tuple(s[group.name].tolist()) if known else () for s in (scores.sensitivity, scores.standard_error)]
    return TradeoffGroup(group.name, group.kind.value, group.num_units, *values)


def _judged(evaluate: Callable[[nn.Module], float], model: nn.Module, evidence: Evidence) -> float:
    """Return the metric of a model, as a part of the job."""
    with part("judging", "model", 1, shown=evidence.progress) as step:
        value = evaluate(model)
        step()
    return value


def _comparable(pairs: Sequence[Sequence[float]]) -> list[float]:
    """Return the time of the dense model and of each pruned one, from the two in turns.

    A machine that does something else for a while slows both of a pair, so that their ratio is what counts.

    Args:
        pairs: Time of the dense model and of a pruned one.

    Returns:
        The shortest time of the dense model, and in each pair's ratio to it those of the pruned ones.
    """
    dense = min(before for before, _ in pairs)
    return [dense, *(dense * after / before for before, after in pairs)]


def _asking(config: HapConfig, keep: float) -> HapConfig:
    """Return the same settings with another share to keep."""
    return config.with_amount(Amount(config.asked.what, keep))


def _predicted(decision: Decision) -> float:
    """Return what the sensitivities of the units that go add up to."""
    sensitivity = decision.scores.sensitivity
    return sum(
        float(sensitivity[g.group.name][g.units(PRUNE)].sum()) for g in decision.stage if g.group.name in sensitivity
    )


def milliseconds(models: Sequence[nn.Module], batch: Batch) -> list[float]:
    """Return the shortest time of one batch without gradients of each model, measured in turns.

    Args:
        models: The models.
        batch: Keyword arguments of their forward.

    Returns:
        The time of each in milliseconds.
    """
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as stack, torch.no_grad():
        for model in models:
            stack.enter_context(preserved(model))
        moved = [move_to_model(model, batch) for model in models]
        # In turns, so that what else the machine does falls on all of them; the first turn warms up.
        begun, turn = time.perf_counter(), 0
        while turn <= _FEWEST or (turn <= _MOST and time.perf_counter() - begun < _SECONDS):
            turn += 1
            for model, own, taken in zip(models, moved, times, strict=True):
                start = time.perf_counter()
                call(model, own)
                device = next(model.parameters()).device
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken.append(1000 * (time.perf_counter() - start))
    return [min(taken[1:]) for taken in times]
