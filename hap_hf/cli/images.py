"""Rows of images as samples of a model."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hap_hf.cli.data import column
from hap_hf.cli.labels import classes_of
from hap_hf.cli.text import LABELS, Sample

logger = logging.getLogger(__name__)

IMAGES = ("image", "img", "pixel_values")


def pictured(rows: Any, model: Any, processor: Any, given: Any) -> list[Sample]:
    """Return a sample for each row of an image and a label."""
    image = column(rows, given.image_column, IMAGES, "image")
    label = column(rows, given.label_column, (*LABELS, "fine_label"), "label")
    samples, class_of = [], classes_of(rows, label, model.config)
    for row in rows:
        pixels = _resized(row[image], model.config) if processor is None else _processed(row[image], processor)
        samples.append({"pixel_values": pixels, "labels": class_of(row[label])})
    return samples


def _processed(image: Any, processor: Any) -> Tensor:
    picture = image.convert("RGB") if hasattr(image, "convert") else np.asarray(image, dtype=np.uint8)
    found: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    return found


def _resized(image: Any, config: Any) -> Tensor:
    """Return an image as a model without a processor gets it: in its size, from -1 to 1, ``[channels, size, size]``."""
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if hasattr(image, "convert"):
        image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.as_tensor(np.asarray(image, dtype=np.float32)) / 127.5 - 1
    pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
    pixels = pixels.expand(channels, -1, -1) if pixels.shape[0] == 1 else pixels
    if isinstance(size, int) and pixels.shape[-2:] != (size, size):
        pixels = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return pixels.contiguous()
