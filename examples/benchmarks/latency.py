r"""What pruning saves on the clock: a dense model against its pruned versions, with and without implants.

Every model is cut to ``--keep`` of its prunable multiply-accumulates by removal alone, and once more with a share of
the cut units implanted at the same number of remaining parameters. The versions run in turns in one process (dense,
pruned, with implants, dense, ...), so that a machine that speeds up or slows down does so for all of them, and each
finds the caches as another one left them. A run's time is divided by that of the dense run of the same turn; the table
shows the median of these ratios and their quartiles beside the ratios of multiply-accumulates and of parameters.

The weights are random, as drawn at construction, for the time of a product does not depend on its numbers. Which units
go does matter, and by default that is drawn too, so that every layer loses about the same share. Magnitudes of
untrained weights (``--method magnitude``) only tell at which scale each layer was drawn: they empty some layers and
leave others whole, as no trained model is pruned.

Numbers of channels and neurons are multiples of ``--round_to``; ``--round_to 1`` shows what odd ones cost at the same
budget. An implanted layer's total is such a multiple, its kept and its implanted part need not be. Compilation takes
far longer than the runs; what was compiled once is found again in the compiler's cache on disk.

    python examples/benchmarks/latency.py --models cifar_resnet56 resnet50 --batch_sizes 1 --modes eager compiled
"""

import argparse
import copy
import dataclasses
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hap_hf import Decision, HapConfig, ModelSize, carry_out_, decide, decide_again, measure_size

logger = logging.getLogger("latency")

Batch = dict[str, Tensor]
BERT = "bert_base"
MODELS = ["cifar_resnet56", "resnet18", "resnet50", "vit_tiny_patch16_224", "mobilenetv3_small_100", BERT]
MIN_RUNS = 5
"""Turns that are made however long they take; quartiles of fewer say nothing."""


@dataclass(frozen=True)
class Version:
    """A model as it is timed.

    Args:
        name: What was done to it.
        model: The model, on its device and in evaluation mode.
        implanted: Implanted share of all units that could be pruned.
        size: Its parameters and multiply-accumulates.
    """

    name: str
    model: nn.Module
    implanted: float
    size: ModelSize


def main(argv: Sequence[str] | None = None) -> str:
    """Measure and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with what it was measured on and the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(words)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lines = []
    for name in options.models:
        start = time.perf_counter()
        versions = make_versions(build(name, options), make_batch(name, 1, options), options)
        logger.info("%s: %d versions made in %.0f s", name, len(versions), time.perf_counter() - start)
        for batch_size in options.batch_sizes:
            batch = make_batch(name, batch_size, options)
            for mode in options.modes:
                start = time.perf_counter()
                lines += rows_of(versions, [name, str(batch_size), mode], measure(versions, batch, mode, options))
                logger.info("%s, batch %d, %s: %.0f s", name, batch_size, mode, time.perf_counter() - start)
    command = f"```bash\npython examples/benchmarks/latency.py {shlex.join(words)}\n```\n"
    text = f"{to_markdown(lines)}\n{describe(options)}\n\n{command}"
    print(text)
    return text


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"names of timm, or {BERT} for BERT-base's shape")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--keep", type=float, default=0.5, help="share of the prunable multiply-accumulates to keep")
    parser.add_argument("--implant_ratio", type=float, default=0.3, help="implanted share of the cut units")
    parser.add_argument("--round_to", type=int, default=8, help="numbers of channels and neurons are multiples of this")
    parser.add_argument("--method", choices=["random", "magnitude"], default="random", help="how to score")
    parser.add_argument("--runs", type=int, default=30, help="turns at most")
    parser.add_argument("--seconds", type=float, default=10, help=f"no new turn after these, once there are {MIN_RUNS}")
    parser.add_argument("--warmup", type=int, default=2, help="turns that are not counted")
    parser.add_argument("--tokens", type=int, default=128, help=f"length of the sequences of {BERT}")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cpu or cuda")
    parser.add_argument("--channels_last", action="store_true", help="lay images out with their channels last")
    options = parser.parse_args(words)
    if options.runs < 2:
        parser.error(f"--runs must be at least 2, for quartiles, got {options.runs}")
    if options.warmup < 1:
        parser.error(f"--warmup must be at least 1, for compilation, got {options.warmup}")
    return options


def build(name: str, options: argparse.Namespace) -> nn.Module:
    """Return a dense model with random weights, on its device and in evaluation mode."""
    if name == BERT:
        config = BertConfig(max_position_embeddings=max(512, options.tokens))
        return BertForSequenceClassification(config).to(options.device).eval()
    return timm.create_model(name).to(options.device).eval()


def make_batch(name: str, batch_size: int, options: argparse.Namespace) -> Batch:
    """Return random inputs of the model's own size, under their argument's name."""
    if name == BERT:
        vocabulary = BertConfig().vocab_size
        return {"input_ids": torch.randint(vocabulary, (batch_size, options.tokens), device=options.device)}
    images = torch.randn(batch_size, *timm.get_pretrained_cfg(name).input_size, device=options.device)
    return {"x": images.contiguous(memory_format=torch.channels_last) if options.channels_last else images}


def make_versions(dense: nn.Module, batch: Batch, options: argparse.Namespace) -> list[Version]:
    """Return the model, its pruned version, and the one with implants where a layer can take some.

    Args:
        dense: The model.
        batch: One sample.
        options: The command line.

    Returns:
        The versions, the dense one first.
    """
    config = HapConfig(
        target_macs=options.keep, round_to=options.round_to, method=options.method, recalibrate=False, progress=False
    )
    decisions = {"pruned": decide(config.evidence(dense, [batch]), config)}
    if options.implant_ratio > 0:
        left = decisions["pruned"].expected
        implanting = dataclasses.replace(
            config,
            target_macs=None,
            target_params=left.prunable_after.params / left.prunable_before.params,
            implant_ratio=options.implant_ratio,
        )
        decision = decide_again(decisions["pruned"], implanting)
        if _implanted(decision):  # hap_hf logs why there are none
            decisions["with implants"] = decision
    versions = [_version("dense", dense, 0.0, batch, options)]
    for name, decision in decisions.items():
        model = copy.deepcopy(dense)
        carry_out_(model, decision)
        versions.append(_version(name, model, _implanted(decision), batch, options))
    return versions


def _implanted(decision: Decision) -> float:
    return sum(plan.implanted for plan in decision.plan) / sum(plan.group.num_units for plan in decision.plan)


def _version(name: str, model: nn.Module, implanted: float, batch: Batch, options: argparse.Namespace) -> Version:
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return Version(name, model, implanted, measure_size(model, batch))


def measure(
    versions: Sequence[Version], batch: Batch, mode: str, options: argparse.Namespace
) -> list[list[float]] | Exception:
    """Return the seconds of every run of every version, or why they do not compile.

    Args:
        versions: What to time.
        batch: The inputs.
        mode: ``"eager"`` or ``"compiled"``.
        options: The command line.

    Returns:
        For each version its runs, the same number for all; or the compiler's error.
    """
    models = [version.model for version in versions]
    if mode == "compiled":
        # Every batch size gets kernels of its own, and versions never meet the limit on compilations of one function.
        torch.compiler.reset()
        # In one graph or not at all: what silently ran in part would not be the compiled model's time.
        models = [torch.compile(model, fullgraph=True, dynamic=False) for model in models]
    calls = [partial(model, **batch) for model in models]
    wait = torch.get_device_module(options.device).synchronize
    with torch.no_grad():
        try:
            in_turns(calls, wait, runs=options.warmup)
        except Exception as error:  # whatever a compiler raises is its row
            if mode != "compiled":
                raise
            logger.warning("%s does not compile", type(versions[0].model).__name__, exc_info=error)
            return error
        return in_turns(calls, wait, runs=options.runs, seconds=options.seconds)


def in_turns(
    calls: Sequence[Callable[[], object]], wait: Callable[[], object], *, runs: int, seconds: float = float("inf")
) -> list[list[float]]:
    """Return the seconds that each call takes, each called once a turn.

    Args:
        calls: What to time.
        wait: Returns when the device has done all it was given.
        runs: Number of turns at most.
        seconds: No new turn begins after these, once there are ``MIN_RUNS``.

    Returns:
        For each call the seconds of its runs.
    """
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for turn in range(runs):
        if turn >= MIN_RUNS and time.perf_counter() > end:
            break
        for call, mine in zip(calls, times, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            mine.append(time.perf_counter() - start)
    return times


def rows_of(
    versions: Sequence[Version], about: Sequence[str], times: Sequence[Sequence[float]] | Exception
) -> list[list[str]]:
    """Return a line of the table for each version, or one that says why there are none.

    Args:
        versions: What was timed, the dense version first.
        about: The first cells of each line.
        times: For each version the seconds of its runs, or why it has none.

    Returns:
        The cells.
    """
    if isinstance(times, Exception):
        reason = (str(times).strip().splitlines() or [""])[0]
        return [[*about, f"{type(times).__name__}: {reason}"[:120].replace("|", "/"), *[""] * 7]]
    dense, lines = versions[0].size, []
    for version, mine in zip(versions, times, strict=True):
        ratios = [own / reference for own, reference in zip(mine, times[0], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append([
            *about,
            version.name,
            f"{100 * version.implanted:.0f}%",
            f"{version.size.params / dense.params:.3f}",
            f"{version.size.macs / dense.macs:.3f}",
            f"{middle:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{1e3 * statistics.median(mine):.2f}",
            str(len(mine)),
        ])
    return lines


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines as a table; parameters, multiply-accumulates and times are shares of the dense model's."""
    head = ["model", "batch", "mode", "version", "units implanted", "parameters", "MACs", "time", "quartiles"]
    head += ["median, ms", "runs"]
    rule = ["---", "---:", "---", "---", *["---:"] * 7]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def describe(options: argparse.Namespace) -> str:
    """Return what the times were measured on."""
    if options.device.type == "cpu":
        chip = torch.backends.cpu.get_cpu_capability()
    else:
        chip = torch.get_device_module(options.device).get_device_name(options.device)
    layout = ", channels last" if options.channels_last else ""
    return f"torch {torch.__version__}, {options.device} ({chip}), {options.threads} CPU thread(s), float32{layout}"


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    main()
