"""What a Hutchinson probe costs beside a forward and backward pass of the same batch.

A Hessian-vector product by double backward differentiates the gradient's graph once more: two forward-backward passes'
worth of work. Both are timed in turns on the same batch; the marginal cost of a probe is the difference between scoring
with many and with few probes.

    python examples/benchmarks/probe_cost.py --hidden 384 --layers 6 --batch 16 --tokens 64
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification

from hap_hf import HapConfig, find_groups, score_groups


def seconds(call: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> float:
    """Print the ratio.

    Args:
        argv: Command line, without the program's name.

    Returns:
        Median cost of a probe in forward and backward passes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--few", type=int, default=2, help="probes of the shorter run")
    parser.add_argument("--many", type=int, default=8, help="probes of the longer run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden,
    )
    model = BertForSequenceClassification(config).eval()
    batch = {
        "input_ids": torch.randint(1, config.vocab_size, (options.batch, options.tokens)),
        "attention_mask": torch.ones(options.batch, options.tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (options.batch,)),
    }
    groups = find_groups(model, batch)
    # The same tensors are differentiated in both: those that hold heads and neurons.
    scored = {s.tensor for g in groups for s in g.scored_slices()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in scored)

    def training_pass() -> None:
        torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])

    def scoring(probes: int) -> None:
        score_groups(model, groups, [batch], HapConfig(prune_ratio=0.5, num_probes=probes, progress=False))

    training_pass()  # warm up
    scoring(options.few)
    passes, probes, whole = [], [], []
    for _ in range(options.repeats):
        one = seconds(training_pass)
        few, many = seconds(lambda: scoring(options.few)), seconds(lambda: scoring(options.many))
        passes.append(one)
        probes.append((many - few) / (options.many - options.few) / one)
        whole.append(many / options.many / one)
    ratio = statistics.median(probes)
    print(
        f"BERT {options.layers} x {options.hidden}, batch {options.batch} x {options.tokens}, "
        f"{options.threads} thread(s), median of {options.repeats}:\n"
        f"  forward and backward         {statistics.median(passes):.3f} s\n"
        f"  one more probe               {ratio:.2f} forward and backward passes\n"
        f"  a probe of {options.many}, set-up included {statistics.median(whole):.2f}"
    )
    return ratio


if __name__ == "__main__":
    main()
