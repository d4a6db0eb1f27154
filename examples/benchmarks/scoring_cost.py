r"""What scoring costs beside training on the same batches: time, memory, growth with batches and with parameters.

For BERTs of several sizes with random weights, each stage runs in a process of its own, in turns with a plain forward
and backward pass over the same batches; the column ``passes`` is the median ratio of the two. Memory is the most
that the process had beyond its model, on the CPU the resident set, and ``times training`` what that is to the memory
of a training of the same batches with AdamW, in another process.

Stages: a method's scores (``ggn``, ``mask_ggn``, ``mask_fisher``, ``hessian``, whose figures are those of a single
probe, with ``--probes`` of them made), ``compensation``, which measures what layers read, and ``default``, which is all
that ``hap_hf.prune`` does on the batches up to the plan: measure, and score in four passes. ``@bf16`` and ``@fp16``
score in that precision.

    python examples/benchmarks/scoring_cost.py --shapes 2x128 6x384 12x768 --batches 1 2 4

    python examples/benchmarks/scoring_cost.py --shapes 12x768 --batches 32 --batch 16 --repeats 1 --stages default
"""

import argparse
import copy
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from trace_runs import most_memory, reset_most_memory
from transformers import BertConfig, BertForSequenceClassification

from hap_hf import Compensation, Decision, HapConfig, decide, find_groups, known_criteria, score_groups

Batch = Mapping[str, Tensor]
STAGES = ["training", "ggn", "mask_ggn", "mask_fisher", "hessian", "compensation", "default"]


@dataclass(frozen=True)
class Work:
    """What a process does.

    Args:
        stage: One of ``STAGES``, with ``@`` and a precision behind it where that is not float32.
        layers: Number of layers.
        hidden: Hidden size.
        num_batches: Number of batches.
        batch: Samples of each.
        tokens: Tokens of each sample.
        probes: Probes of ``hessian``.
        repeats: How often it is done.
        threads: CPU threads.
    """

    stage: str
    layers: int
    hidden: int
    num_batches: int
    batch: int
    tokens: int
    probes: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Cost:
    """What it cost.

    Args:
        params: Parameters of the model.
        seconds: Median wall-clock time.
        passes: Median of the time in forward and backward passes over the same batches.
        mebibytes: Most memory beyond the model's.
    """

    params: int
    seconds: float
    passes: float
    mebibytes: float


def main(argv: Sequence[str] | None = None) -> str:
    """Measure and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", default=["2x128", "6x384", "12x768"], help="layers x hidden size")
    parser.add_argument("--stages", nargs="+", default=STAGES[1:])
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="numbers of batches")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    own = parser.parse_args(words)
    lines = [
        ["BERT", "parameters, M", "batches", "stage", "time, s", "passes", "memory, MiB", "times training"],
        ["---", "---:", "---:", "---", "---:", "---:", "---:", "---:"],
    ]
    for shape in own.shapes:
        layers, hidden = map(int, shape.split("x"))
        for number in own.batches:
            plain = 0.0
            for stage in ("training", *(s for s in own.stages if s != "training")):
                cost = alone(
                    Work(stage, layers, hidden, number, own.batch, own.tokens, own.probes, own.repeats, own.threads)
                )
                plain = plain or cost.mebibytes
                figures = [f"{cost.seconds:.2f}", f"{cost.passes:.2f}", f"{cost.mebibytes:.0f}"]
                times = f"{cost.mebibytes / plain:.2f}" if plain else ""
                lines.append([shape, f"{cost.params / 1e6:.1f}", str(number), stage, *figures, times])
                print(_row(lines[-1]), file=sys.stderr, flush=True)  # the whole takes long
    text = "\n".join(map(_row, lines)) + "\n"
    text += (
        f"\n{own.batch} x {own.tokens} tokens a batch, {own.threads} thread(s), median of {own.repeats}; "
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}\n"
        f"\n```bash\npython examples/benchmarks/scoring_cost.py {shlex.join(words)}\n```\n"
    )
    print(text)
    return text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def alone(work: Work) -> Cost:
    """Do some work in a new process.

    Args:
        work: What to do.

    Returns:
        What it cost.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "hap_hf"])
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(do, work).result()


def do(work: Work) -> Cost:
    """Do some work in this process.

    Args:
        work: What to do.

    Returns:
        What it cost.
    """
    torch.set_num_threads(work.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 32 if work.hidden < 768 else work.hidden // 64,
        intermediate_size=4 * work.hidden,
    )
    model = BertForSequenceClassification(config).eval().to(device)
    batches = [
        {
            "input_ids": torch.randint(1, config.vocab_size, (work.batch, work.tokens), device=device),
            "labels": torch.randint(0, 2, (work.batch,), device=device),
        }
        for _ in range(work.num_batches)
    ]
    tiny = [{name: value[:2, :8] if value.dim() > 1 else value[:2] for name, value in batches[0].items()}]
    run = stage_of(work, model)

    def training(some: Sequence[Batch]) -> None:
        for batch in some:
            model(**batch).loss.backward()

    stage_of(work, copy.deepcopy(model))(tiny)  # whatever is set up at the first use of a kernel is not the stage's
    before = reset_most_memory()
    seconds = [_seconds(run, batches)]
    memory = most_memory() - before
    passes = [seconds[0] / _seconds(training, batches)]
    for _ in range(work.repeats - 1):
        one = _seconds(training, batches)
        seconds.append(_seconds(run, batches))
        passes.append(seconds[-1] / one)
    shown = work.probes if work.stage.startswith("hessian") else 1
    return Cost(
        sum(p.numel() for p in model.parameters()),
        statistics.median(seconds) / shown,
        statistics.median(passes) / shown,
        memory,
    )


def stage_of(work: Work, model: BertForSequenceClassification) -> Callable[[Sequence[Batch]], object]:
    """Return what a stage does with batches.

    Args:
        work: The stage.
        model: The model.

    Returns:
        The function.
    """
    name, _, precision = work.stage.partition("@")
    if name == "training":
        optimizer = torch.optim.AdamW(model.parameters())

        def training(batches: Sequence[Batch]) -> None:
            for batch in batches:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()

        return training
    criterion = known_criteria()[name if name not in {"compensation", "default"} else "mask_ggn"]
    config = HapConfig(
        prune_ratio=0.5,
        method=criterion(**({"num_probes": work.probes} if name.startswith("hessian") else {})),
        precision=precision or "fp32",
        max_batches=None,
        progress=False,
    )
    if name == "default":
        return lambda batches: decide(config.evidence(model, batches), config)
    groups = find_groups(model, {"input_ids": torch.arange(1, 17, device=model.device).view(2, 8)})
    if name == "compensation":
        return lambda batches: Compensation.measure(config.evidence(model, batches), groups)
    return lambda batches: score_groups(config.evidence(model, batches), groups, config)


def _seconds(call: Callable[[Sequence[Batch]], object], batches: Sequence[Batch]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = call(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if isinstance(found, Decision):  # discovery looks at the model, and takes as long however many batches there are
        return found.seconds["measuring"] + found.seconds["scoring"]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
