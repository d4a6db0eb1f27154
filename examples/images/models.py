"""The model of a run: an architecture of timm or a checkpoint, with the classes of the images, and what it takes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import hap_hf.cifar  # noqa: F401 (makes its architectures known to timm)
from images.samples import Images, Preprocessing
from images.settings import ModelArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model and what goes with it.

    Args:
        model: The model.
        untrained: Names of weights that came from nowhere.
        preprocessing: Makes batches for the model.
        processor: The image processor of the checkpoint, to be saved with the model; None where its config says it all.
        images: The splits, with the labels in the order of the model's outputs.
    """

    model: PreTrainedModel
    untrained: frozenset[str]
    preprocessing: Preprocessing
    processor: Any
    images: Mapping[str, Images]


def load_model(arguments: ModelArguments, images: Mapping[str, Images], cache_dir: str | None = None) -> Loaded:
    """Return the model that ``arguments`` name, for the classes of ``images``.

    Args:
        arguments: Name of the model and how to prepare images for it.
        images: The splits.
        cache_dir: Where to keep what is downloaded.

    Returns:
        The model and what goes with it.

    Raises:
        FileNotFoundError: If there is no such model or file of weights.
        ValueError: If model, weights and images do not fit together.
    """
    loaded = _load(arguments, images, cache_dir)
    takes, have = len(loaded.preprocessing.mean), images["test"].shape[0]
    if have > takes:
        raise ValueError(
            f"{arguments.model} takes images of {takes} channel and these have {have}; convert them to grey"
        )
    return loaded


def _load(arguments: ModelArguments, images: Mapping[str, Images], cache_dir: str | None) -> Loaded:
    name = arguments.model.removeprefix("timm:")
    if name == arguments.model and (Path(name).exists() or not timm.is_model(name)):
        for flag, value in (("weights", arguments.weights), ("model_args", arguments.model_args)):
            if value is not None:
                raise ValueError(f"--{flag} belongs to an untrained architecture of timm, got --model {name}")
        return _from_checkpoint(arguments, images, cache_dir)
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:8]
        raise FileNotFoundError(f"--model {arguments.model}: timm {timm.__version__} has no {name}, similar: {similar}")
    return _from_architecture(name, arguments, images)


def _from_architecture(name: str, arguments: ModelArguments, images: Mapping[str, Images]) -> Loaded:
    """Build an architecture of timm, with its own initial weights or those of a file."""
    channels, height, width = images["test"].shape
    names = images["test"].names
    described = timm.models.get_pretrained_cfg(name).to_dict()
    fixed = described.get("fixed_input_size", False)
    size = described["input_size"][1:] if fixed else (height, width)
    if arguments.image_size is not None:
        size = (arguments.image_size, arguments.image_size)
    model_args = {"in_chans": channels, **({"img_size": size} if fixed else {}), **arguments.timm_args()}
    preprocessing = _preprocessing(arguments, described["mean"], described["std"], size, model_args["in_chans"])
    config = TimmWrapperConfig(
        architecture=name,
        model_args=model_args,
        num_labels=len(names),
        problem_type="single_label_classification",
        # What AutoImageProcessor reads of a saved model.
        pretrained_cfg={
            "input_size": [model_args["in_chans"], *size],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    )
    _name_classes(config, names)
    model = TimmWrapperForImageClassification(config)
    if arguments.weights is None:
        # The wrapper draws all weights alike; timm knows how each architecture wants them.
        weights = timm.create_model(name, num_classes=len(names), **model_args).state_dict()
        untrained = frozenset(weights)
    else:
        weights = _read_weights(Path(arguments.weights), model.timm_model)
        untrained = frozenset()
    model.timm_model.load_state_dict(weights)
    return Loaded(model, untrained, preprocessing, None, images)


def _read_weights(file: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights of ``model`` from a file; the counters of batch norms, which nothing reads, may be missing."""
    if file.suffix != ".safetensors":
        raise ValueError(f"--weights must be a .safetensors file, got {str(file)!r}; save others anew with safetensors")
    if not file.is_file():
        raise FileNotFoundError(f"--weights {str(file)!r} does not exist")
    wanted, given = model.state_dict(), load_file(file)
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    complete = {**counters, **given}
    problems = [f"{key} is missing" for key in wanted if key not in complete]
    problems += [f"{key} is not in the model" for key in complete if key not in wanted]
    problems += [
        f"{key} is {list(value.shape)} and the model's {list(wanted[key].shape)}"
        for key, value in complete.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"--weights {file} does not fit {type(model).__name__}: {shown}{more}; check --model, --model_args and the "
            "classes and channels of --dataset"
        )
    return complete


def _from_checkpoint(arguments: ModelArguments, images: Mapping[str, Images], cache_dir: str | None) -> Loaded:
    """Load a checkpoint of transformers from a folder or the Hub."""
    name = arguments.model
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    except OSError as error:
        raise FileNotFoundError(
            f"--model {name!r} is neither a folder with a model nor known to timm, nor can it be loaded from the Hub "
            f"({str(error).splitlines()[0]})"
        ) from error
    has_head = any("ForImageClassification" in architecture for architecture in config.architectures or ())
    names = images["test"].names
    if has_head and not arguments.ignore_mismatched_sizes:
        images = {split: _in_order_of(config, part, name) for split, part in images.items()}
    else:
        _name_classes(config, names)
    config.problem_type = "single_label_classification"
    model, info = AutoModelForImageClassification.from_pretrained(
        name,
        config=config,
        dtype="float32",  # whatever it is stored in: optimizer steps get lost in half precision
        ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
        cache_dir=cache_dir,
        output_loading_info=True,
    )
    untrained = frozenset({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    try:
        processor = AutoImageProcessor.from_pretrained(name, cache_dir=cache_dir)
    except OSError:  # it has none
        processor = None
    timm_data = getattr(processor, "data_config", None)
    if timm_data is not None:
        channels, *size = timm_data["input_size"]
        preprocessing = _preprocessing(arguments, timm_data["mean"], timm_data["std"], size, channels)
        return Loaded(model, untrained, preprocessing, None, images)
    size = _size_of(config, processor) or images["test"].shape[1:]
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    channels = getattr(config, "num_channels", 3)
    return Loaded(model, untrained, _preprocessing(arguments, mean, std, size, channels), processor, images)


def _in_order_of(config: PreTrainedConfig, images: Images, model: str) -> Images:
    """Return images with the numbers of a model's classes, and let the config name them; its head keeps its meaning."""
    known = [str(config.id2label[i]) for i in range(config.num_labels)]
    number_of = {name.casefold(): number for number, name in enumerate(known)}
    wanted = [name.casefold() for name in images.names]
    if len(number_of) == len(known) and set(wanted) <= set(number_of):
        return replace(images, labels=torch.tensor([number_of[n] for n in wanted])[images.labels], names=tuple(known))
    if len(known) != len(wanted):
        raise ValueError(
            f"{model} tells {len(known)} classes apart and the images have {len(wanted)}; pass "
            "--ignore_mismatched_sizes to give it a new head"
        )
    if not all(name.startswith("LABEL_") for name in known):
        logger.warning("the model's classes %s are taken for the images' %s, in this order", known, images.names)
    _name_classes(config, images.names)
    return images


def _name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def _size_of(config: PreTrainedConfig, processor: Any) -> Sequence[int] | None:
    """Return the height and width that a checkpoint was made for."""
    size = getattr(config, "image_size", None)
    if size is not None:
        return size if isinstance(size, (list, tuple)) else (size, size)
    for stored in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        if stored and "height" in stored:
            return stored["height"], stored["width"]
        if stored and "shortest_edge" in stored:
            return stored["shortest_edge"], stored["shortest_edge"]
    return None


def _preprocessing(
    arguments: ModelArguments,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: Sequence[int],
    channels: int,
) -> Preprocessing:
    """Return the preprocessing of flags where they are given, and of the model's statistics where they fit."""

    def per_channel(flag: str, given: Sequence[float] | None, stored: Sequence[float] | None) -> tuple[float, ...]:
        if given is not None and len(given) not in {1, channels}:
            raise ValueError(f"--{flag} must have 1 value or {channels}, one for each channel, got {list(given)}")
        values = given or (stored if stored is not None and len(stored) == channels else (0.5,))
        return tuple(values) * (channels // len(values))

    height, width = (arguments.image_size,) * 2 if arguments.image_size is not None else size
    return Preprocessing(
        per_channel("image_mean", arguments.image_mean, mean),
        per_channel("image_std", arguments.image_std, std),
        (height, width),
    )
