"""Rows of images as samples of a model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hap_hf.cli.data import column
from hap_hf.cli.labels import classes_of
from hap_hf.cli.text import LABELS, Sample
from hap_hf.cli.told import reason
from hap_hf.errors import ConfigError

IMAGES = ("image", "img", "pixel_values")


def pictured(rows: Any, model: Any, processor: Any, given: Any) -> list[Sample]:
    """Return a sample for each row of an image and a label."""
    image = column(rows, given.image_column, IMAGES, "image")
    label = column(rows, given.label_column, (*LABELS, "fine_label"), "label")
    samples, class_of = [], classes_of(rows, label, model.config)
    for value, number in zip(_images(rows, image), rows[label], strict=True):
        pixels = (
            _resized(value, model.config) if processor is None else _processed(value, processor, model.config, image)
        )
        samples.append({"pixel_values": pixels, "labels": class_of(number)})
    return samples


def _images(rows: Any, image: str) -> Iterator[Any]:
    """Yield the images of a column, each a picture of PIL or an array."""
    try:
        for value in rows[image]:
            if not hasattr(value, "convert"):
                value = _array(value, image)
            yield value
    except OSError as error:  # PIL on files that are none
        raise ConfigError(f"an image of column {image!r} cannot be read: {error}; remove its file or row") from error


def _array(value: Any, image: str) -> Any:
    """Return nested lists or an array as pixels of ``[height, width]`` or ``[height, width, channels]``."""
    try:
        found = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.zeros(0, dtype=np.float32)
    if found.ndim not in {2, 3} or not found.size:
        raise ConfigError(
            f"expected an image in each row of column {image!r}, got {str(value)[:60]!r}; name another column by "
            "--image-column, or give a folder of images"
        )
    return found


def _processed(image: Any, processor: Any, config: Any, column: str) -> Tensor:
    """Return an image as the processor of a model makes it."""
    if not hasattr(image, "convert"):
        # Processors want channels, mostly three, and a picture of PIL can be turned into any.
        from PIL import Image

        whole = (image == image.round()).all() and image.min() >= 0 and image.max() <= 255
        if not whole or image.shape[2:] not in {(), (1,), (3,), (4,)}:
            raise ConfigError(
                f"expected images of whole numbers from 0 to 255 with channels last in column {column!r}, got "
                f"{image.min():.4g} to {image.max():.4g} in the shape {list(image.shape)}"
            )
        image = Image.fromarray((image[..., 0] if image.shape[2:] == (1,) else image).astype(np.uint8))
    picture = image.convert("L" if getattr(config, "num_channels", 3) == 1 else "RGB")
    try:
        found: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    except (ValueError, TypeError, RuntimeError) as error:  # such as means of three channels for a model of one
        raise ConfigError(f"the model's image processor does not take column {column!r}: {reason(error)}") from error
    return found


def _resized(image: Any, config: Any) -> Tensor:
    """Return an image as a model without a processor gets it: in its size, from -1 to 1, ``[channels, size, size]``."""
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if hasattr(image, "convert"):
        image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.as_tensor(np.asarray(image, dtype=np.float32)) / 127.5 - 1
    pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
    pixels = pixels.expand(channels, -1, -1) if pixels.shape[0] == 1 else pixels
    if pixels.shape[0] != channels:
        raise ConfigError(
            f"the model takes images of {channels} channels, and the data has {pixels.shape[0]} or not last, where "
            "channels belong"
        )
    if isinstance(size, int) and pixels.shape[-2:] != (size, size):
        pixels = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return pixels.contiguous()
