"""Runs of estimators of trace scores, each in a process of its own, so that time and memory are that of it alone."""

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trace_peers import PEERS, by_peer

from hap_hf import Group, HapConfig, Method, score_groups
from hap_hf.config import Hvp
from hap_hf.criteria import UnitWeights
from hap_hf.criteria.units import roles_of
from hap_hf.curvature import LinearisedLosses, estimate_traces
from hap_hf.evidence.batches import few_samples
from hap_hf.evidence.losses import model_loss
from hap_hf.evidence.task import ScoringTask

Settings = Mapping[str, Any]
_REPEATS, _SHORT = 5, 10.0
"""What is done in a few seconds is done so many times, and the fastest counts: the others were disturbed."""

Material = tuple[nn.Module, Sequence[Group], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Estimate:
    """Scores of all units and what they cost.

    Args:
        num_probes: Number of probes for each batch.
        sensitivity: Sensitivity of each unit, ``[num_units of all groups]``.
        error: Standard error of each by the noise of the probes alone; None where it is not known.
        seconds: Wall-clock time.
        cpu_seconds: Time that the process was computing.
        mebibytes: Most memory beyond that of the model; 0 until the process has ended.
    """

    num_probes: int
    sensitivity: Sequence[float]
    error: Sequence[float] | None
    seconds: float
    cpu_seconds: float
    mebibytes: float = 0.0


def by_method(settings: Settings, task: ScoringTask, numbers: Sequence[int]) -> Iterator[Estimate]:
    """Estimate by a method of the library, once for each number of probes.

    Args:
        settings: What differs from the settings of ``task``.
        task: What to score, on what and how.
        numbers: Numbers of probes; 0 for a method without.

    Yields:
        The estimates.
    """
    for number in numbers:
        probes = {"num_probes": number} if number > 1 else {}
        config = replace(task.config, **settings, **probes)
        start = _now()
        scores = score_groups(task.model, task.groups, task.batches, config)
        yield _estimate(number, torch.cat([scores.sensitivity[g.name] for g in task.groups]), None, _since(start))


def by_probes(method: Method, task: ScoringTask, numbers: Sequence[int]) -> Iterator[Estimate]:
    """Estimate by ``hessian``, or by ``hessian_split`` with the exact Gauss-Newton trace, in one run for all numbers.

    As the first probes of a long run are those of a short one, only the longest is made; its sums after each probe are
    kept, and the time until then, which for several batches adds up over them.

    Args:
        method: Which of the two.
        task: What to score, on what and how.
        numbers: Numbers of probes, at least 2.

    Yields:
        The estimates, in growing numbers of probes.
    """
    config = replace(task.config, num_probes=max(numbers))
    task = replace(task, config=config)
    units = UnitWeights.of(task.model, task.groups, roles_of(config.coupling))
    factors = units.trace_factors(config.coupling)
    records: list[_Batch] = []
    start = _now()
    known = torch.zeros((), dtype=torch.float64)
    losses: Any = task.losses()
    if method is Method.HESSIAN_SPLIT:
        exact = replace(config, method=Method.GGN, num_output_probes=None)
        scores = score_groups(task.model, task.groups, task.batches, exact)
        known = torch.cat([scores.sensitivity[g.name] for g in task.groups])
        losses = LinearisedLosses(task.model, task.losses(), units.tensors)
    before = _since(start)

    def timed() -> Iterator[tuple[Callable[[], Tensor], int]]:
        begin = _now()
        for loss, terms in losses:
            records.append(_Batch(terms, begin, [], []))
            yield loss, terms
            begin = _now()

    def reduce(products: Mapping[str, Tensor]) -> Tensor:
        sums = units.totals(units.marginals(products), factors)
        records[-1].samples.append(sums.cpu())
        records[-1].spent.append(_since(records[-1].begin))
        return sums

    with task.ready(units.tensors, method.value, "probe", config.num_probes) as tick:
        estimate_traces(
            timed(),
            units.tensors,
            reduce,
            partial(task.signs, units.tensors),
            num_probes=config.num_probes,
            on_probe=tick,
        )
    num_terms = sum(record.num_terms for record in records)
    for number in sorted(numbers):
        mean, variance, spent = known.clone(), torch.zeros((), dtype=torch.float64), before
        for record in records:
            share, first = record.num_terms / num_terms, torch.stack(record.samples[:number]).double()
            mean = mean + share * first.mean(0)
            variance = variance + share**2 * first.var(0) / number
            spent = _sum(spent, record.spent[number - 1])
        yield _estimate(number, mean, variance.sqrt(), spent)


def by_other(peer: str, task: ScoringTask, numbers: Sequence[int]) -> Iterator[Estimate]:
    """Estimate with the Hessian-vector products of a peer, once for each number of probes.

    Args:
        peer: One of ``PEERS``.
        task: What to score, on what and how.
        numbers: Numbers of probes, at least 2.

    Yields:
        The estimates.
    """
    for number in numbers:
        start = _now()
        sensitivity = by_peer(peer, replace(task, config=replace(task.config, num_probes=number)))
        yield _estimate(number, sensitivity, None, _since(start))


SPLIT = f"{Method.HESSIAN_SPLIT}, exact G"
ESTIMATORS: Mapping[str, Callable[[ScoringTask, Sequence[int]], Iterator[Estimate]]] = {
    "hessian": partial(by_probes, Method.HESSIAN),
    SPLIT: partial(by_probes, Method.HESSIAN_SPLIT),
    "hessian_split": partial(by_method, {"method": Method.HESSIAN_SPLIT, "num_output_probes": 1}),
    "ggn": partial(by_method, {"method": Method.GGN, "num_output_probes": 1}),
    "ggn, exact": partial(by_method, {"method": Method.GGN, "num_output_probes": None}),
    **{
        f"hessian, {hvp}": partial(by_method, {"method": Method.HESSIAN, "hvp": hvp})
        for hvp in Hvp
        if hvp is not Hvp.DOUBLE_BACKWARD
    },
    **{peer: partial(by_other, peer) for peer in PEERS},
}
"""How to estimate, by name."""
SAME_PROBES = tuple(name for name in ESTIMATORS if name in PEERS or name.startswith("hessian, "))
"""What multiplies the probes of ``hessian`` in another way, and has to come to the same scores."""


def run_alone(material: Path, config: HapConfig, name: str, numbers: Sequence[int], threads: int = 1) -> list[Estimate]:
    """Run an estimator in a new process.

    Args:
        material: File with the :data:`Material`, by ``torch.save``.
        config: The settings.
        name: One of ``ESTIMATORS``.
        numbers: Numbers of probes.
        threads: CPU threads.

    Returns:
        The estimates.
    """
    # Forked off a server that has imported everything and computed nothing: clean, and there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "hap_hf", "trace_runs"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_run, material, config, name, list(numbers), threads).result()


def _run(material: Path, config: HapConfig, name: str, numbers: Sequence[int], threads: int) -> list[Estimate]:
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, groups, batches = torch.load(material, map_location=device, weights_only=False)
    config = replace(config, method=Method.HESSIAN, max_batches=None, progress=False, stop_share=None)
    task = ScoringTask(model, groups, batches, config, model_loss)
    few = [few_samples(batches[0])]
    for _ in ESTIMATORS[name](replace(task, batches=few), [min(numbers[0], 2)]):
        pass  # whatever is set up at the first use of a kernel is not the estimator's
    before = reset_most_memory()
    runs = [list(ESTIMATORS[name](task, numbers))]
    while len(runs) < _REPEATS and len(runs) * sum(estimate.seconds for estimate in runs[0]) < _SHORT:
        runs.append(list(ESTIMATORS[name](task, numbers)))
    memory = most_memory() - before
    return [replace(min(each, key=lambda e: e.seconds), mebibytes=memory) for each in zip(*runs, strict=True)]


def reset_most_memory() -> float:
    """Let :func:`most_memory` begin anew from what is in use, on a GPU and on Linux; elsewhere it never falls.

    Returns:
        What it is then.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # other C libraries return what is freed by themselves
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return most_memory()


def most_memory() -> float:
    """Return the most memory that this process has had, in MiB: that of torch's on a GPU, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@dataclass(frozen=True)
class _Batch:
    """What was seen of one batch.

    Args:
        num_terms: Its number of loss terms.
        begin: When it began.
        samples: Sums over the units after each probe.
        spent: Time until then.
    """

    num_terms: int
    begin: tuple[float, float]
    samples: list[Tensor]
    spent: list[tuple[float, float]]


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    now = _now()
    return now[0] - start[0], now[1] - start[1]


def _sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def _estimate(number: int, sensitivity: Tensor, error: Tensor | None, spent: tuple[float, float]) -> Estimate:
    return Estimate(number, sensitivity.tolist(), None if error is None else error.tolist(), *spent)
