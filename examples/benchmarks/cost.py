r"""What pruning costs, in passes: a forward and a backward pass in training mode over the same batches.

Each subject is pruned by the default to half of its prunable parameters. CPU seconds of the process, so that the
figures hold on a machine that others use too; one thread; medians. In turns with the pass that they are divided by:
``discovery`` (``find_groups``), ``decision`` (``decide`` without its discovery: measuring, scoring, what makes up for
units), ``surgery`` (``carry_out_``). Beside them what was counted meanwhile: forward passes of the model, calls of
``torch.autograd.grad``, and Cholesky factorisations for each layer that makes up for units.

Subjects: ``bert:LxH`` and ``llama:LxH`` with random weights, ``timm:NAME@SIZE`` likewise, ``texts:FOLDER:FILE`` for
a model of a folder on a file with texts and labels, ``cifar:NAME:FOLDER:FILE`` for a timm model with the weights of a
file on the images of a folder.

    python examples/benchmarks/cost.py bert:4x256 llama:4x256 timm:resnet18@64 --batches 2 --repeats 3
"""

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from material import MaterialArguments, images, texts
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hap_hf

Batch = Mapping[str, Tensor]
COLUMNS = ["pass, s", "discovery", "decision", "surgery", "all", "forwards", "gradients", "factors a reader"]


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
    parser.add_argument("subjects", nargs="+")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples of a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sample; longer texts of files are cut")
    parser.add_argument("--repeats", type=int, default=3)
    own = parser.parse_args(words)
    torch.set_num_threads(1)
    lines = [["subject", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for subject in own.subjects:
        model, batches = made(subject, own)
        found = [costs(copy.deepcopy(model), batches) for _ in range(own.repeats)]
        cells = [f"{statistics.median(row[column] for row in found):.2f}" for column in COLUMNS]
        lines.append([subject.replace(":", " ").split("/")[0].strip(), *cells])
        print(_row(lines[-1]), file=sys.stderr, flush=True)
    text = "\n".join(map(_row, lines)) + "\n"
    text += f"\nCPU, one thread, median of {own.repeats}; torch {torch.__version__}\n"
    text += f"\n```bash\npython examples/benchmarks/cost.py {shlex.join(words)}\n```\n"
    print(text)
    return text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def made(subject: str, own: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    """Return a model and batches with labels.

    Args:
        subject: What the command names.
        own: The other arguments.

    Returns:
        The model, and as many batches as are asked for.
    """
    torch.manual_seed(0)
    kind, _, rest = subject.partition(":")
    if kind in {"texts", "cifar"}:
        parts = rest.split(":")
        most = own.batches * own.batch
        if kind == "texts":
            arguments = MaterialArguments(parts[0], train_file=parts[1], validation_file=parts[1])
            arguments.max_seq_length = own.tokens
        else:
            arguments = MaterialArguments(parts[0], dataset_name=parts[1], weights=parts[2])
        arguments.max_train_samples = arguments.max_eval_samples = most
        material = (texts if kind == "texts" else images)(arguments)
        samples = [material.train[i] for i in range(most)]
        starts = range(0, most, own.batch)
        return material.model, [dict(material.collate(samples[i : i + own.batch])) for i in starts]
    if kind == "timm":
        name, _, size = rest.partition("@")
        shape = (own.batch, 3, int(size), int(size))
        model: nn.Module = timm.create_model(name, num_classes=10)
        # What norms are set to zero by initialisation is not so in a trained model.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
        return model, [{"x": torch.randn(shape), "labels": torch.randint(10, (own.batch,))} for _ in range(own.batches)]
    layers, hidden = map(int, rest.split("x"))
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 2000}
    if kind == "bert":
        heads = {"num_attention_heads": max(hidden // 64, 2), "intermediate_size": 4 * hidden}
        model = BertForSequenceClassification(BertConfig(**sizes, **heads))
    else:
        # Feed-forward layers of 8/3 of the width, in whole blocks of 8, and two query heads for each key head.
        heads = {"num_attention_heads": max(hidden // 64, 4), "num_key_value_heads": max(hidden // 128, 2)}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, intermediate_size=hidden * 8 // 24 * 8))
    batches = []
    for _ in range(own.batches):
        ids = torch.randint(1, 2000, (own.batch, own.tokens))
        labels = torch.randint(2, (own.batch,)) if kind == "bert" else ids.clone()
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return model, batches


def costs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Prune a model and say what it cost.

    Args:
        model: The model, which is pruned.
        batches: Batches with labels.

    Returns:
        CPU seconds of a pass, everything else in passes, and what was counted.
    """
    config = hap_hf.HapConfig(target_params=0.5, max_batches=None, progress=False)

    def training() -> None:
        model.train()
        for batch in batches:
            output = model(**batch) if "input_ids" in batch or "pixel_values" in batch else model(batch["x"])
            logits = output if isinstance(output, Tensor) else output.logits
            one = isinstance(output, Tensor) or output.loss is None
            (nn.functional.cross_entropy(logits, batch["labels"]) if one else output.loss).backward()
        model.zero_grad(set_to_none=True)
        model.eval()

    training()  # whatever is set up at the first use of a kernel
    one = _seconds(training)[0]
    discovery, _ = _seconds(lambda: hap_hf.find_groups(model, batches[0]))
    with counted(model) as counts:
        both, decision = _seconds(lambda: hap_hf.decide(config.evidence(model, batches), config))
        surgery, _ = _seconds(lambda: hap_hf.carry_out_(model, decision))
    readers = len(decision.compensation.moments) if decision.compensation is not None else 0
    return {
        "pass, s": one,
        "discovery": discovery / one,
        "decision": (both - discovery) / one,
        "surgery": surgery / one,
        "all": (both + surgery) / one,
        "forwards": counts["forwards"],
        "gradients": counts["gradients"],
        "factors a reader": counts["factors"] / max(readers, 1),
    }


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


@contextmanager
def counted(model: nn.Module) -> Generator[Counter[str]]:
    """Count inside the block how often the model is run, differentiated, and a matrix factorised.

    Args:
        model: The model.

    Yields:
        The counts.
    """
    counts: Counter[str] = Counter()

    def counting(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return function(*args, **kwargs)

        return call

    own = torch.autograd.grad, torch.linalg.cholesky_ex
    handle = model.register_forward_pre_hook(lambda *_: counts.update(forwards=1))
    torch.autograd.grad, torch.linalg.cholesky_ex = counting(own[0], "gradients"), counting(own[1], "factors")
    try:
        yield counts
    finally:
        torch.autograd.grad, torch.linalg.cholesky_ex = own
        handle.remove()


if __name__ == "__main__":
    main()
