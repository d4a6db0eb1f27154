"""What scores are compared on: a dense classifier of texts or images, batches to score on, and its accuracy."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from material import Batch, Material, MaterialArguments, images, texts
from torch.utils.data import DataLoader, Subset
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
CIFAR_RECIPE = {
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 1e-4,
    "max_grad_norm": 0.0,
}
"""How image classifiers are trained where no flag says otherwise."""


@dataclass(frozen=True)
class Subject:
    """A model that is trained, and what it works on.

    Args:
        model: The dense model.
        batches: Batches of training data to score on, as the training sees them.
        material: Where they come from.
        args: The Trainer's arguments.
        on_images: Whether it is an image classifier of timm; else one of texts.
        held_out: Batches of training data that nothing here was trained on.
    """

    model: PreTrainedModel
    batches: Sequence[Batch]
    material: Material
    args: TrainingArguments
    on_images: bool
    held_out: Sequence[Batch] = ()

    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of right answers of a model on the evaluation data.

        Args:
            model: The model; left as it is.

        Returns:
            The share.
        """
        material, was_training, right = self.material, model.training, 0
        model.eval()
        with torch.no_grad():
            for batch in DataLoader(
                material.evaluation, self.args.per_device_eval_batch_size, collate_fn=material.collate
            ):
                logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
                right += int((logits.argmax(-1).cpu() == batch["labels"]).sum())
        model.train(was_training)
        return right / len(material.evaluation)

    def fine_tune_(self, model: PreTrainedModel, callbacks: Sequence[TrainerCallback] = (), **changes: Any) -> None:
        """Train a model in place.

        Args:
            model: The model.
            callbacks: What the Trainer calls besides.
            **changes: Arguments of the Trainer that are others than those of the dense training.
        """
        fine_tune_(model, self.material, dataclasses.replace(self.args, **changes), callbacks)


def fine_tune_(
    model: PreTrainedModel, material: Material, args: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    """Train a model in place.

    Args:
        model: The model.
        material: What it learns from.
        args: The Trainer's arguments; nothing happens where they ask for no epochs.
        callbacks: What the Trainer calls besides.
    """
    if args.num_train_epochs > 0:
        collate = material.collate_training
        Trainer(model, args, train_dataset=material.train, data_collator=collate, callbacks=[*callbacks]).train()
        model.__dict__.pop("forward", None)  # accelerate leaves its autocast around it


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the flags of one benchmark, which leaves those of its subject alone.

    Args:
        description: What the benchmark does.

    Returns:
        The parser, without flags.
    """
    return argparse.ArgumentParser(
        description=description,
        epilog=describe_flags(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def describe_flags() -> str:
    """Return what ``--help`` says of the flags that all benchmarks of a subject have in common."""
    parser = HfArgumentParser([MaterialArguments], usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("--max_batches", type=int, default=8, help="Batches to score on.")
    return f"and all flags of transformers.TrainingArguments, and these:\n{parser.format_help()}"


def parse(flags: Sequence[str], folder: Path, seed: int, *, on_images: bool) -> Any:
    """Return the settings of a subject.

    Args:
        flags: Those of :func:`describe_flags` and of ``transformers.TrainingArguments``.
        folder: Where the dense model is kept.
        seed: Seed of the training and of the batches.
        on_images: Whether it classifies images.

    Returns:
        Model and data, the Trainer's arguments, and the number of batches to score on.
    """
    parser = HfArgumentParser([MaterialArguments, TrainingArguments], allow_abbrev=False)
    parser.add_argument("--max_batches", type=int, default=8, help="Batches to score on.")
    parser.set_defaults(**QUIET, **(CIFAR_RECIPE if on_images else {}))
    words = [*flags, "--output_dir", str(folder), "--seed", str(seed)]
    own, args, rest = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    args.dataloader_pin_memory &= args.device.type != "cpu"  # there it does nothing but warn
    return own, args, rest.max_batches


def make_subject(flags: Sequence[str], folder: Path, seed: int, *, on_images: bool, num_held_out: int = 0) -> Subject:
    """Train a classifier, or read back the one of an earlier run.

    Args:
        flags: See :func:`parse`.
        folder: Where the dense model is kept.
        seed: Seed of the training and of the batches.
        on_images: Whether it classifies images.
        num_held_out: So many of the training samples, the last ones, are not trained on.

    Returns:
        The subject.
    """
    own, args, max_batches = parse(flags, folder, seed, on_images=on_images)
    set_seed(seed)
    material = images(own) if on_images else texts(own)
    rest = len(material.train) - num_held_out
    held_out = Subset(material.train, range(rest, len(material.train)))
    if num_held_out:
        material = dataclasses.replace(material, train=Subset(material.train, range(rest)))
    if not (folder / "config.json").is_file():
        fine_tune_(material.model, material, args)
        material.model.save_pretrained(folder)
    kind = AutoModelForImageClassification if on_images else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder).to(args.device)
    set_seed(seed)
    loader = DataLoader(
        material.train, args.per_device_train_batch_size, shuffle=True, collate_fn=material.collate_training
    )
    batches = [dict(batch) for batch in islice(loader, max_batches)]
    kept = DataLoader(held_out, args.per_device_train_batch_size, collate_fn=material.collate)
    return Subject(model, batches, material, args, on_images, [dict(batch) for batch in kept])
