"""What scores are compared on: a dense model, batches to score on, and its accuracy; text or images."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glue.settings import parse as parse_glue
from glue.stages import Material, fine_tune
from images.settings import parse as parse_images
from images.stages import ImageMaterial
from run_cifar_hap import prepare as prepare_images
from run_glue_hap import prepare as prepare_glue
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hap_hf import HapConfig
from hap_hf.trainer.scoring import scoring_batches

logger = logging.getLogger("subjects")

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model that is fine-tuned, and what it works on.

    Args:
        model: The dense model.
        config: Settings of the command line.
        batches: Batches of training data to score on, as the callback takes them.
        accuracy: Share of right answers of a model on the evaluation data.
        on_images: Whether it is an image classifier of timm; else one of texts.
    """

    model: PreTrainedModel
    config: HapConfig
    batches: Sequence[Batch]
    accuracy: Callable[[PreTrainedModel], float]
    on_images: bool


def glue_subject(flags: Sequence[str], folder: Path, seed: int) -> Subject:
    """Fine-tune a text classifier, or read back the one of an earlier run.

    Args:
        flags: Flags of ``run_glue_hap.py``; amounts and output folder are set here.
        folder: Where the dense model is kept.
        seed: Seed of the fine-tuning and of the scores.

    Returns:
        The subject.
    """
    words = [*flags, "--do_train", "--do_eval", "--prune_ratio", "0.5", "--save_strategy", "no"]
    model_args, data_args, pruning, args = parse_glue([*words, "--output_dir", str(folder), "--seed", str(seed)])
    args.dataloader_pin_memory &= args.device.type != "cpu"  # there it does nothing but warn
    config = pruning.to_config(seed)
    assert config is not None  # there is an amount
    set_seed(seed)
    model, material, _ = prepare_glue(model_args, data_args, args)
    if not (folder / "config.json").is_file():
        fine_tune(model, args, material)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    loader = material.trainer(model, args).get_train_dataloader()  # without the columns that the model does not take
    batches = scoring_batches(loader.dataset, loader.collate_fn, args.per_device_train_batch_size, config)
    return Subject(model, config, list(batches), lambda m: accuracy_of(m, material, args), on_images=False)


def image_subject(flags: Sequence[str], folder: Path, seed: int) -> Subject:
    """Train an image classifier, or read back the one of an earlier run.

    Args:
        flags: Flags of ``run_cifar_hap.py``; amounts and output folder are set here.
        folder: Where the dense model is kept.
        seed: Seed of the training and of the scores.

    Returns:
        The subject.
    """
    settings = parse_images([*flags, "--prune_ratio", "0.5", "--output_dir", str(folder), "--seed", str(seed)])
    assert settings.config is not None  # there is an amount
    set_seed(seed)
    model, material = prepare_images(settings)
    args = settings.training.to_training_arguments(progress=False)
    if not (folder / "config.json").is_file():
        if settings.training.epochs > 0:
            fine_tune(model, args, material)
        else:
            model.save_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).to(args.device)
    batches = scoring_batches(
        material.images["train"], material.collate_training, settings.training.batch_size, settings.config
    )
    return Subject(model, settings.config, list(batches), lambda m: accuracy_of(m, material, args), on_images=True)


def accuracy_of(model: PreTrainedModel, material: Material | ImageMaterial, args: TrainingArguments) -> float:
    """Return the share of right answers of a model on the evaluation data.

    Args:
        model: The model; left as it is.
        material: What it works on.
        args: The Trainer's arguments.

    Returns:
        The share.
    """
    # A Trainer leaves its autocast around the forward of a model, which must not reach the next stage.
    trainer = material.trainer(copy.deepcopy(model), args)
    return material.evaluate(trainer, "eval")["eval_accuracy"]
