"""What pruning gives for eight tiny models, to compare one state of the code with another.

    python tests/helpers/stored_models.py --write FILE      # with the code that is trusted
    python tests/helpers/stored_models.py --compare FILE    # with the code that is in question

Models, batches and trainings are seeded, in float64, and use nothing but the public interface. Of each case are stored
the plan, the shape of every tensor and two sums of its entries, and the loss and the mean logit on the first batch.
Weights, biases and the statistics of batch norms are random: zeros and ones would hide wrong slices.

By default the Gauss-Newton matrix is estimated with random signs along eigenvectors of the loss's Hessian at the
outputs, and which way an eigenvector points is up to rounding errors. So that no plan is, there are two classes, which
leave one eigenvector a sample, or as many tokens as make the code do without eigenvectors, or no random signs.
"""

import argparse
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback

import hap_hf
from hap_hf import HapConfig, Hessian, HessianPruner, MaskGGN, PruningPlan

RELATIVE, ABSOLUTE = 1e-6, 1e-8
ABSOLUTE_OF_IMPLANTS = 1e-6  # they are fitted to sums in float32
DIGITS = 10
MOST_SHOWN = 20

VOCAB, TOKENS = 160, 9
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}

Batch = dict[str, Tensor]


class Pruned(NamedTuple):
    """A case's outcome.

    Args:
        model: The pruned model.
        plan: Everything that was done to it.
        batch: A batch with labels.
    """

    model: nn.Module
    plan: PruningPlan
    batch: Batch


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``model`` in float64 and eval mode, with noise that depends on the seed and the tensors' names alone."""
    model.double().eval()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=_generator(name, seed), dtype=p.dtype)
            if p.dim() > 1:
                p.copy_(1.2 * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
        for name in norms:
            norm, generator = model.get_submodule(name), _generator(name, seed)
            norm.running_mean.copy_(0.3 * torch.randn(norm.running_mean.shape, generator=generator, dtype=p.dtype))
            norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator, dtype=p.dtype))
    return model


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)


def texts(count: int = 3, samples: int = 6) -> list[Batch]:
    """Return batches of token ids with padding, and one label a sample."""
    batches = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        mask = torch.ones(samples, TOKENS, dtype=torch.long)
        mask[number % samples, -3:] = 0
        ids = torch.randint(3, VOCAB, (samples, TOKENS), generator=generator)
        labels = torch.randint(2, (samples,), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def labelled_tokens(length: int = TOKENS) -> list[Batch]:
    """Return the texts with their first tokens as labels, padding left out."""
    return [
        {**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)[:, :length].contiguous()}
        for b in texts()
    ]


def images(size: int, classes: int, count: int = 3, samples: int = 8) -> list[Batch]:
    """Return batches of random images and labels."""
    batches = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(samples, 3, size, size, generator=generator, dtype=torch.float64)
        batches.append({"pixel_values": pixels, "labels": torch.randint(classes, (samples,), generator=generator)})
    return batches


def pruned(model: nn.Module, batches: Sequence[Batch], **settings: Any) -> Pruned:
    """Return ``model`` after ``prune``, with the plan in its config."""
    hap_hf.prune(model, batches, HapConfig(progress=False, **settings))
    return Pruned(model, hap_hf.plan_of(model), batches[0])


def bert() -> Pruned:
    """Prune a classifier by the default method to half of its parameters."""
    model = filled(hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)), seed=4)
    return pruned(model, texts(), target_params=0.5)


def llama() -> Pruned:
    """Prune grouped queries, two key heads a layer with four query heads each, to half of the multiplications."""
    config = hf.LlamaConfig(**{**ENCODER, "hidden_size": 32, "num_attention_heads": 8}, num_key_value_heads=2)
    return pruned(filled(hf.LlamaForCausalLM(config), seed=9), labelled_tokens(), target_macs=0.5)


def t5() -> Pruned:
    """Prune an encoder and a decoder, whose layers share a position table, by the Hessian trace."""
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = filled(hf.T5ForConditionalGeneration(config))
    return pruned(model, labelled_tokens(6), prune_ratio=0.4, method=Hessian(num_probes=3))


def vit() -> Pruned:
    """Prune an image classifier by the Fisher information of masks."""
    sizes = {k: v for k, v in ENCODER.items() if k not in {"vocab_size", "max_position_embeddings", "pad_token_id"}}
    model = filled(hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=12, patch_size=4, num_labels=3)))
    return pruned(model, images(12, 3), target_params=0.4, method="mask_fisher")


def cifar_resnet20() -> Pruned:
    """Prune a plain module with padding shortcuts on pairs, and wrap it afterwards."""
    model, batches = filled(timm.create_model("cifar_resnet20", num_classes=10), seed=4), images(8, 10)
    pairs = [(b["pixel_values"], b["labels"]) for b in batches]
    report = hap_hf.prune(
        model, pairs, HapConfig(target_macs=0.5, method=MaskGGN(num_output_probes=None), progress=False)
    )
    return Pruned(hap_hf.wrap_timm(model, report.plan), report.plan, batches[0])


def efficientnet() -> Pruned:
    """Prune depthwise convolutions, squeeze and excitation, and residual additions, inside transformers' wrapper."""
    config = hf.TimmWrapperConfig(architecture="test_efficientnet", num_labels=2)
    model = filled(hf.TimmWrapperForImageClassification(config), seed=11)
    return pruned(model, images(32, 2), target_params=0.5)


def gpt2_with_implants() -> Pruned:
    """Prune a model of transposed weights and fused projections, a third of what is cut becoming implants."""
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=24, n_layer=3, n_head=4, n_inner=40, bos_token_id=1, eos_token_id=2
    )
    model = filled(hf.GPT2LMHeadModel(config), seed=7)
    return pruned(model, labelled_tokens(), target_params=0.5, implant_ratio=0.3)


def two_rounds_of_a_trainer() -> Pruned:
    """Train a classifier without dropout for six steps, with a round after the second and after the fourth one."""
    config = hf.BertConfig(**{**ENCODER, "num_hidden_layers": 2}, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = filled(hf.BertForSequenceClassification(config))
    samples = [{k: v[i] for k, v in b.items()} for b in texts(8) for i in range(6)]
    settings = HapConfig(target_params=0.5, max_batches=3, progress=False)
    pruner = HessianPruner(settings, step=2, num_rounds=2, interval=2)
    with tempfile.TemporaryDirectory() as folder:
        args = hf.TrainingArguments(
            folder,
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            optim="adamw_torch",
            weight_decay=0.01,
            seed=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = hf.Trainer(model, args, train_dataset=samples, callbacks=[pruner])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Pruned(trainer.model.eval(), hap_hf.plan_of(trainer.model), texts(1)[0])


CASES: Mapping[str, Callable[[], Pruned]] = {
    case.__name__: case
    for case in (bert, llama, t5, vit, cifar_resnet20, efficientnet, gpt2_with_implants, two_rounds_of_a_trainer)
}


def summary(case: str) -> dict[str, Any]:
    """Run a case and return what is stored of it, as plain JSON values."""
    model, plan, batch = CASES[case]()
    with torch.no_grad():
        output = model(**batch)
    numbers = {"loss": output.loss.item(), "mean logit": output.logits.mean().item()}
    shapes = {}
    for name, tensor in model.state_dict().items():
        shapes[name] = "x".join(map(str, tensor.shape))
        entries = tensor.double().flatten()
        if "implant" in name:
            entries = entries.abs()  # which sign singular vectors get is up to the machine
        numbers[f"sum of {name}"] = entries.sum().item()
        numbers[f"weighted sum of {name}"] = (entries @ torch.arange(len(entries)).double().cos()).item()
    return {
        "plan": [{g.group.name: _letters_and_ranks(g.actions, g.ranks) for g in stage} for stage in plan.stages],
        "shapes": shapes,
        "numbers": {name: float(f"{x:.{DIGITS}g}") for name, x in numbers.items()},
    }


def _letters_and_ranks(actions: str, ranks: Mapping[str, int]) -> str:
    runs = " ".join(f"{len(list(run))}{letter}" for letter, run in groupby(actions))
    return " ".join([runs, *(f"{name}:{rank}" for name, rank in sorted(ranks.items()))])


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Return a line for each entry of a summary that is not as expected: numbers up to a tolerance, others exactly."""
    old, new = _flat(expected), _flat(got)
    return [
        f"{name}: expected {old.get(name)}, got {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if not _same(old.get(name), new.get(name), ABSOLUTE_OF_IMPLANTS if "implant" in name else ABSOLUTE)
    ]


def _flat(stored: Mapping[str, Any]) -> dict[str, Any]:
    stages = {f"stage {i} of the plan": stage for i, stage in enumerate(stored["plan"])}
    parts = {**stages, "shapes": stored["shapes"], "numbers": stored["numbers"]}
    return {f"{part}, {name}": value for part, values in parts.items() for name, value in values.items()}


def _same(expected: Any, got: Any, absolute: float) -> bool:
    if isinstance(expected, float) and isinstance(got, float):
        return abs(got - expected) <= absolute + RELATIVE * abs(expected)
    return bool(expected == got)


def main() -> int:
    """Write or compare, and return the exit code."""
    parser = argparse.ArgumentParser(description="Store what pruning gives for tiny models, or compare with it.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="run the cases and store what they give")
    action.add_argument("--compare", type=Path, metavar="FILE", help="run the cases and compare with what is stored")
    parser.add_argument("--only", choices=CASES, help="run this case alone; writing leaves the others as stored")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.write or options.compare
    results = json.loads(path.read_text()) if options.compare or (options.only and path.exists()) else {}
    failed = False
    for case in [options.only] if options.only else CASES:
        start = time.perf_counter()
        got = summary(case)
        lines = [] if options.write else differences(results[case], got)
        results[case] = got
        failed |= bool(lines)
        verdict = "written" if options.write else f"{len(lines)} differences" if lines else "equal"
        more = [f"and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
        shown = "".join(f"  {line}\n" for line in [*lines[:MOST_SHOWN], *more])
        sys.stdout.write(f"{case}: {verdict} ({time.perf_counter() - start:.1f} s)\n{shown}")
    if options.write:
        path.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
