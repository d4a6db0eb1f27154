r"""Train an image classifier, prune it, fine-tune it and reload it.

The image counterpart of ``run_glue_hap.py``: convolutional networks of timm, among them those that CIFAR has in the
pruning literature (``cifar_resnet20``, ``cifar_resnet56`` and more), and image classifiers of transformers, on CIFAR,
on images of one's own or, without any download, on scikit-learn's digits. ``--help`` describes all flags; every setting
of ``hap_hf.HapConfig`` is one, of the same name but for ``--score_precision``. A run goes through these stages:

1. The dense model is trained for ``--epochs``, by SGD with a cosine schedule. ``--epochs 0`` leaves this out, for
   ``--weights`` or a checkpoint that are trained already.
2. With an amount (``--prune_ratio``, ``--target_params`` or ``--target_macs``) the dense model is saved to
   ``OUTPUT_DIR/dense`` and evaluated. A second training follows, of ``--finetune_epochs``, in which ``HessianPruner``
   prunes the model: before the first step, or after ``--prune_step`` steps or ``--prune_epoch`` epochs, in
   ``--num_rounds`` rounds. It is evaluated right after pruning and at the end. Without an amount nothing is pruned.
3. ``AutoModelForImageClassification.from_pretrained`` reads the model back from ``OUTPUT_DIR``. Its logits are compared
   with those of the model that was trained, and its accuracy is reported as ``eval_*``.

``OUTPUT_DIR/all_results.json`` holds every metric, size and time, ``results.md`` a table of them and
``pruning_report.md`` what was cut. Everything works on local files without a network:

    python examples/run_cifar_hap.py --target_params 0.5 --implant_ratio 0.2 --output_dir runs/digits

    python examples/run_cifar_hap.py --model cifar_resnet56 --dataset cifar10 --augment --epochs 160 \
        --target_params 0.3 --finetune_epochs 80 --finetune_learning_rate 0.02 --output_dir runs/resnet56
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import torch
import transformers
from glue.stages import fine_tune, prune_and_recover
from images.data import load_images
from images.models import load_model
from images.settings import Settings, parse
from images.stages import ImageMaterial, largest_difference, latencies, write_summary
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed

logger = logging.getLogger("run_cifar_hap")

LATENCY_BATCH = 256


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the stages that the command line asks for.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        What ``all_results.json`` holds.

    Raises:
        ValueError: If the flags, the images or the model do not fit together.
    """
    start = time.perf_counter()
    settings = parse(argv)
    _set_up_logging()
    training, config = settings.training, settings.config
    set_seed(training.seed)
    output = Path(training.output_dir)
    trains = training.epochs > 0
    model, material = prepare(settings)
    args = training.to_training_arguments(progress=settings.pruning.progress)

    results: dict[str, float] = {}
    dense = output if config is None else output / "dense"
    if trains:
        results |= fine_tune(model, dataclasses.replace(args, output_dir=str(dense)), material)
    elif config is not None:
        material.trainer(model, args).save_model(str(dense))
    if config is not None:
        results |= prune_and_recover(model, args, material, config, settings.pruning)
    if trains or config is not None:
        trained, model = model, AutoModelForImageClassification.from_pretrained(output)
        results["reload_max_difference"] = _compare(trained, model, material)
    results |= material.evaluate(material.trainer(model, args), "eval")
    if config is not None:
        results |= _latency({"dense": dense, "pruned": output}, material, args.device)
    results["total_seconds"] = time.perf_counter() - start
    output.mkdir(parents=True, exist_ok=True)
    file = output / "all_results.json"
    file.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if config is not None:
        print(write_summary(results, output))
    shown = ("accuracy", "params", "macs", "milliseconds", "seconds")
    text = [f"{name} {value:.6g}" for name, value in results.items() if any(word in name for word in shown)]
    logger.info("results in %s: %s", file, ", ".join(text))
    return results


def prepare(settings: Settings) -> tuple[PreTrainedModel, ImageMaterial]:
    """Load images and model.

    Args:
        settings: The command line.

    Returns:
        The model and what it works on.

    Raises:
        ValueError: If the images and the model do not fit together, or the model is untrained and is to stay so.
    """
    training = settings.training
    used = training.epochs > 0 or settings.config is not None
    images = load_images(settings.images, train=used, size=settings.model.image_size)
    loaded = load_model(settings.model, images, settings.images.cache_dir)
    if loaded.untrained and training.epochs == 0:
        names = sorted(loaded.untrained)
        raise ValueError(
            f"{settings.model.model} is not trained, it has no values for {', '.join(names[:3])}"
            f"{' and more' if len(names) > 3 else ''}; pass --epochs above 0, or --weights"
        )
    material = ImageMaterial(
        loaded.images, loaded.preprocessing, loaded.processor, training.optimizer(), training.augment
    )
    return loaded.model, material


def _set_up_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    transformers.utils.logging.set_verbosity_warning()
    datasets.utils.logging.set_verbosity_warning()
    for name in ("run_cifar_hap", "images", "hap_hf"):
        logging.getLogger(name).setLevel(logging.INFO)


def _compare(trained: PreTrainedModel, reloaded: PreTrainedModel, material: ImageMaterial) -> float:
    difference = largest_difference(trained, reloaded, material.batch(LATENCY_BATCH))
    if difference:
        logger.warning("the reloaded model's logits differ from the trained one's by up to %g", difference)
    return difference


def _latency(folders: Mapping[str, Path], material: ImageMaterial, device: torch.device) -> dict[str, float]:
    # Read back once more: what a Trainer has had in its hands may run under autocast.
    models = {name: AutoModelForImageClassification.from_pretrained(f).to(device) for name, f in folders.items()}
    batch = material.batch(LATENCY_BATCH)
    measured = {f"{name}_milliseconds": value for name, value in latencies(models, batch).items()}
    return {**measured, "latency_batch_size": len(batch["labels"])}


if __name__ == "__main__":
    main()
