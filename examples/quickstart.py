"""Train a small ViT on handwritten digits, prune half of its encoder, fine-tune, save, reload and compare.

Everything it needs is on disk: the images ship with scikit-learn and the model is built from a config. Run

    python examples/quickstart.py

It takes about two minutes on two cores and prints accuracy, size, multiply-accumulates and measured latency before and
after. `--help` lists what can be changed.
"""

import argparse
import logging
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig, set_seed

from hap_hf import HapConfig, HessianPruner, MaskGGN, known_criteria, measure_size

Samples = list[dict[str, torch.Tensor]]


def digits(seed: int) -> tuple[Samples, Samples]:
    """Return scikit-learn's 1,797 images of 8 x 8 pixels as samples for the Trainer: 80% to train, 20% to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    samples = [
        {"pixel_values": x, "labels": y}
        for x, y in zip(images, torch.tensor(data.target, dtype=torch.long), strict=True)
    ]
    train, test = train_test_split(samples, test_size=0.2, random_state=seed, stratify=data.target)
    return train, test


def build_model() -> nn.Module:
    """Return an untrained ViT: 16 patches of 2 x 2 pixels, 4 layers of 8 heads and 512 FFN neurons."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=512,
        num_labels=10,
    )
    config.architectures = ["ViTForImageClassification"]
    return AutoModelForImageClassification.from_config(config)


def make_trainer(
    model: nn.Module,
    train: Samples,
    test: Samples,
    *,
    epochs: float,
    learning_rate: float,
    output_dir: Path,
    seed: int,
    callbacks: list[HessianPruner] | None = None,
) -> Trainer:
    """Return an ordinary Trainer; the pruner is one callback like any other."""
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=360,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.05,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        seed=seed,
    )
    return Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        callbacks=callbacks,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def latencies(models: dict[str, nn.Module], batch: dict[str, torch.Tensor], repeats: int = 31) -> dict[str, float]:
    """Return the median milliseconds of a forward pass of each model, measured in turns on the same batch."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 3):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                if turn >= 3:  # the first turns warm caches up
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the comparison.

    Args:
        argv: Command line, without the program's name.

    Returns:
        The figures of the printed table, by model.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="folder for both models")
    parser.add_argument("--epochs", type=float, default=20, help="epochs of dense training")
    parser.add_argument("--recovery_epochs", type=float, default=8, help="epochs of fine-tuning after pruning")
    parser.add_argument("--target_params", type=float, default=0.5, help="share of encoder parameters to keep")
    parser.add_argument("--implant_ratio", type=float, default=0.2, help="share of cut units that become implants")
    parser.add_argument("--method", choices=[*known_criteria()], default=MaskGGN.name, help="how units are scored")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and scores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; a model this small gains little from more")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    train, test = digits(options.seed)
    common = {"output_dir": options.output_dir, "seed": options.seed}

    model = build_model()
    trainer = make_trainer(model, train, test, epochs=options.epochs, learning_rate=1e-3, **common)
    trainer.train()
    dense_dir = options.output_dir / "dense"
    trainer.save_model(str(dense_dir))

    config = HapConfig(
        target_params=options.target_params,
        implant_ratio=options.implant_ratio,
        method=options.method,
        seed=options.seed,
        round_to=8,
    )
    pruner = HessianPruner(config)
    trainer = make_trainer(
        model, train, test, epochs=options.recovery_epochs, learning_rate=5e-4, callbacks=[pruner], **common
    )
    trainer.train()
    pruned_dir = options.output_dir / "pruned"
    trainer.save_model(str(pruned_dir))
    print(pruner.reports[-1])

    # From here on only the files count: both models come back through plain from_pretrained.
    models = {
        "dense": AutoModelForImageClassification.from_pretrained(dense_dir).eval(),
        "pruned": AutoModelForImageClassification.from_pretrained(pruned_dir).eval(),
    }
    batch = {"pixel_values": torch.stack([s["pixel_values"] for s in test[:256]])}
    milliseconds = latencies(models, batch)
    results = {}
    for name, loaded in models.items():
        size = measure_size(loaded, batch)
        evaluator = make_trainer(loaded, train, test, epochs=1, learning_rate=0, **common)
        results[name] = {
            "accuracy": evaluator.evaluate()["eval_accuracy"],
            "params": size.params,
            "encoder_params": sum(p.numel() for n, p in loaded.named_parameters() if ".layer" in n),
            "macs": size.macs,
            "milliseconds": milliseconds[name],
        }
    print_table(results)
    return results


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Print the figures of both models and their ratio."""
    table = Table(title="Handwritten digits, 360 test images; latency of a batch of 256")
    for heading in ("", "accuracy", "parameters", "in the encoder", "MMACs an image", "ms a batch"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{100 * r['accuracy']:.1f}%",
            f"{r['params']:,}",
            f"{r['encoder_params']:,}",
            f"{r['macs'] / 1e6:.2f}",
            f"{r['milliseconds']:.1f}",
        )
    dense, pruned = results["dense"], results["pruned"]
    ratios = (f"x {pruned[k] / dense[k]:.2f}" for k in ("params", "encoder_params", "macs", "milliseconds"))
    table.add_row("ratio", f"{100 * (pruned['accuracy'] - dense['accuracy']):+.1f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
