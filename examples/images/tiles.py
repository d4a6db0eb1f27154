"""Images from a folder of tile sheets."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from images.samples import Images


def is_tile_folder(folder: Path) -> bool:
    """Return whether a folder holds tile sheets.

    Args:
        folder: The folder.

    Returns:
        Whether it has a ``test*.webp``.
    """
    return any(folder.glob("test*.webp"))


def load_tiles(folder: Path, split: str) -> Images:
    """Return the images of all sheets of a split; how large a tile is follows from how many there are.

    Args:
        folder: Folder with ``train*.webp`` and ``test*.webp``, each a grid of square images in row-major order,
            ``labels_train.npy``, ``labels_test.npy`` and, where the classes have names, ``meta.json`` with ``classes``.
        split: ``train`` or ``test``.

    Returns:
        The images.

    Raises:
        FileNotFoundError: If sheets or labels are missing.
        ValueError: If labels and tiles do not fit together.
    """
    sheets = sorted(folder.glob(f"{split}*.webp"), key=lambda file: (len(file.name), file.name))
    label_file = folder / f"labels_{split}.npy"
    if not sheets or not label_file.is_file():
        found = sorted(file.name for file in folder.iterdir())
        raise FileNotFoundError(f"{folder}: expected {split}*.webp and {label_file.name}, got {found}")
    labels = torch.from_numpy(np.load(label_file, allow_pickle=False)).long().flatten()
    if not len(labels):
        raise ValueError(f"the {split} split has no images: {label_file} is empty")
    names = _names(folder)
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise ValueError(
            f"{label_file}: expected labels from 0 to {len(names) - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    tiles = np.concatenate([_read(file, len(labels), len(sheets)) for file in sheets])
    return Images(torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous(), labels, names)


def _names(folder: Path) -> tuple[str, ...]:
    meta = folder / "meta.json"
    if meta.is_file():
        return tuple(json.loads(meta.read_text(encoding="utf-8"))["classes"])
    # Both splits count, so that they have the same classes.
    highest = max(int(np.load(file, allow_pickle=False).max(initial=0)) for file in folder.glob("labels_*.npy"))
    return tuple(map(str, range(highest + 1)))


def _read(file: Path, num_labels: int, num_sheets: int) -> np.ndarray:
    """Return the tiles of one sheet, ``[num_tiles, side, side, 3]``."""
    with PIL.Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    height, width, _ = pixels.shape
    side = math.isqrt(height * width * num_sheets // num_labels)
    if not side or height % side or width % side or height * width * num_sheets != side**2 * num_labels:
        raise ValueError(
            f"{file}: {num_labels} labels and {num_sheets} sheets, one of them with {width} x {height} pixels, do not "
            "make square tiles; expected as many tiles on every sheet and one label for each"
        )
    grid = pixels.reshape(height // side, side, width // side, side, 3)
    return grid.swapaxes(1, 2).reshape(-1, side, side, 3)
