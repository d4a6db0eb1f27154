"""A batch to export with, where no data is at hand."""

from typing import Any

import torch
from torch import Tensor

from hap_hf.cli.loading import Loaded
from hap_hf.errors import ConfigError

_TEXTS = ("one two three four five six seven eight nine ten", "one two three four five six")
"""Of different lengths, so that the file learns what padding is."""


def example_batch(loaded: Loaded) -> dict[str, Tensor]:
    """Return two samples of what a model reads; an export needs their shapes, and nothing of what is in them.

    Args:
        loaded: The model, its task, and its tokenizer or image processor.

    Returns:
        Its inputs by name.
    """
    if loaded.task.name == "image-classification":
        return {"pixel_values": torch.rand(2, *_image_shape(loaded), generator=torch.Generator().manual_seed(0))}
    tokenizer = loaded.processor
    pad = tokenizer.pad_token is not None
    found = tokenizer(list(_TEXTS if pad else _TEXTS[:1] * 2), padding=pad, return_tensors="pt")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _image_shape(loaded: Loaded) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model reads."""
    config = loaded.model.config
    timm: Any = getattr(getattr(loaded.model, "timm_model", None), "pretrained_cfg", None)
    if timm is not None:
        channels, height, width = map(int, timm["input_size"])
        return channels, height, width
    channels = int(getattr(config, "num_channels", 3))
    size: Any = getattr(config, "image_size", None)
    if size is None:
        size = getattr(loaded.processor, "crop_size", None) or getattr(loaded.processor, "size", None)
    if isinstance(size, int):
        return channels, size, size
    sides: list[Any] = [None]
    if isinstance(size, (list, tuple)) and len(size) == 2:
        sides = list(size)
    elif size:  # a mapping of one edge or of two
        sides = [size.get(name) or size.get("shortest_edge") for name in ("height", "width")]
    if None in sides:
        raise ConfigError("neither the model nor its processor says how large its images are; give some by --data")
    return channels, int(sides[0]), int(sides[1])
