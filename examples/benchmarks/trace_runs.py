"""Runs of estimators of trace scores, each in a process of its own, so that time and memory are that of it alone."""

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trace_peers import PEERS, OfPeer

from hap_hf import GGN, Criterion, Evidence, Group, Hessian, HessianSplit, Hvp, Scores, ScoringTask

Material = tuple[nn.Module, Sequence[Group], Sequence[Mapping[str, Any]]]
"""Model, groups and batches."""
_REPEATS, _SHORT = 5, 10.0
"""What is done in a few seconds is done so many times, and the fastest counts: the others were disturbed."""
SPLIT = "hessian_split, exact G"
ESTIMATORS: Mapping[str, Callable[[int], Criterion]] = {
    "hessian": lambda number: Hessian(num_probes=number),
    SPLIT: lambda number: HessianSplit(num_probes=number, num_output_probes=None),
    "hessian_split": lambda number: HessianSplit(num_probes=number),
    "ggn": lambda _: GGN(),
    "ggn, exact": lambda _: GGN(num_output_probes=None),
    **{
        f"hessian, {hvp}": partial(lambda hvp, number: Hessian(num_probes=number, hvp=hvp), hvp)
        for hvp in Hvp
        if hvp is not Hvp.DOUBLE_BACKWARD
    },
    **{peer: partial(lambda peer, number: OfPeer(peer=peer, num_probes=number), peer) for peer in PEERS},
}
"""How to estimate with some number of probes, by name."""
SAME_PROBES = tuple(name for name in ESTIMATORS if name in PEERS or name.startswith("hessian, "))
"""What multiplies the probes of ``hessian`` in another way, and has to come to the same scores."""


@dataclass(frozen=True)
class Estimate:
    """Scores of all units and what they cost.

    Args:
        num_probes: Number of probes for each batch.
        sensitivity: Sensitivity of each unit, ``[num_units of all groups]``.
        error: Standard error of each by the noise of the probes alone; None where it is not known.
        seconds: Wall-clock time.
        cpu_seconds: Time that the process was computing.
        mebibytes: Most memory beyond that of the model.
    """

    num_probes: int
    sensitivity: Sequence[float]
    error: Sequence[float] | None
    seconds: float
    cpu_seconds: float
    mebibytes: float = 0.0


def estimate(name: str, number: int, task: ScoringTask) -> Estimate:
    """Estimate once.

    Args:
        name: One of ``ESTIMATORS``.
        number: Number of probes.
        task: What to score, on what.

    Returns:
        The estimate.
    """
    criterion = ESTIMATORS[name](number)
    before = reset_most_memory()
    start, cpu_start = time.perf_counter(), time.process_time()
    scores = criterion.score(task)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    memory = most_memory() - before
    error = None
    if name == "hessian":
        error = _every(scores.standard_error, task)
    elif name == SPLIT:
        # What is there beside the noise of the probes is the spread of the exact part over the samples.
        error = _every(scores.standard_error, task).square()
        error = (error - _every(_exact(task).standard_error, task).square()).clamp_min(0).sqrt()
    sensitivity = _every(scores.sensitivity, task).tolist()
    return Estimate(number, sensitivity, None if error is None else error.tolist(), seconds, cpu_seconds, memory)


def _exact(task: ScoringTask) -> Scores:
    return GGN(num_output_probes=None).score(task)


def _every(by_group: Mapping[str, Tensor], task: ScoringTask) -> Tensor:
    return torch.cat([by_group[group.name] for group in task.groups])


def run_alone(material: Path, name: str, numbers: Sequence[int], *, seed: int = 0, threads: int = 1) -> list[Estimate]:
    """Run an estimator in a new process.

    Args:
        material: File with the :data:`Material`, by ``torch.save``.
        name: One of ``ESTIMATORS``.
        numbers: Numbers of probes.
        seed: Seed of the probes.
        threads: CPU threads.

    Returns:
        The estimates.
    """
    # Forked off a server that has imported everything and computed nothing: clean, and there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "hap_hf", "trace_runs"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(run, material, name, list(numbers), seed, threads).result()


def run(material: Path, name: str, numbers: Sequence[int], seed: int, threads: int) -> list[Estimate]:
    """Run an estimator in this process; see :func:`run_alone`."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, groups, batches = torch.load(material, map_location=device, weights_only=False)
    task = ScoringTask(Evidence.of(model, batches, seed=seed, max_batches=None, progress=False), tuple(groups))
    few = {key: value[:2] for key, value in batches[0].items()}
    # Whatever is set up at the first use of a kernel is not the estimator's.
    ESTIMATORS[name](2).score(replace(task, evidence=replace(task.evidence, batches=[few])))
    found = []
    for number in numbers:
        runs = [estimate(name, number, task)]
        while len(runs) < _REPEATS and len(runs) * runs[0].seconds < _SHORT:
            runs.append(estimate(name, number, task))
        most = max(each.mebibytes for each in runs)
        found.append(replace(min(runs, key=lambda each: each.seconds), mebibytes=most))
    return found


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
