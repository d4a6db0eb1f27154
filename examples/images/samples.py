"""Images as bytes in memory, and what turns them into batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class Images(Dataset[dict[str, Tensor]]):
    """Images of one split; a sample is ``pixel_values`` and ``labels``.

    Args:
        pixels: Bytes, ``[num_images, channels, height, width]``, with 1 or 3 channels.
        labels: Numbers of the classes, ``[num_images]``, int64.
        names: Names of the classes in the order of their numbers.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample."""
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def sample(self, most: int | None) -> "Images":
        """Return at most so many images, drawn at random with a fixed seed: folders are sorted by class.

        Args:
            most: The number; None for all.

        Returns:
            The images in their order.
        """
        if most is None or most >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:most].sort().values
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class Preprocessing:
    """Makes a batch of samples what a model takes: resized, with as many channels, normalised. A collator.

    Args:
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        size: Height and width.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return a batch.

        Args:
            samples: Samples of an ``Images``.

        Returns:
            ``pixel_values``, ``[num_samples, channels, height, width]``, and ``labels``, ``[num_samples]``.
        """
        x = torch.stack([sample["pixel_values"] for sample in samples]).float() / 255
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        x = (x - self._column(self.mean)) / self._column(self.std)  # grey becomes as many channels as there are means
        return {"pixel_values": x, "labels": torch.stack([sample["labels"] for sample in samples])}

    def augment(self, pixel_values: Tensor, *, most: int = 4) -> Tensor:
        """Shift every image at random, with black where that leaves a gap, and mirror half of those in colour.

        The usual augmentation for CIFAR: crops of the image padded by 4 pixels on each side, and horizontal flips.

        Args:
            pixel_values: A batch as this object makes it, ``[num_samples, channels, height, width]``.
            most: Largest shift in pixels.

        Returns:
            A new batch.
        """
        n, channels, height, width = pixel_values.shape
        black = -self._column(self.mean, pixel_values) / self._column(self.std, pixel_values)
        padded = F.pad(pixel_values - black, (most, most, most, most)) + black
        # One gather serves the batch: a row of indices for each image and axis.
        shifts = torch.randint(2 * most + 1, (2, n, 1), device=pixel_values.device)
        rows = torch.arange(height, device=pixel_values.device) + shifts[0]  # [n, height]
        columns = torch.arange(width, device=pixel_values.device) + shifts[1]  # [n, width]
        if channels == 3:  # a mirrored digit is another sign, or none
            mirrored = torch.rand(n, 1, device=pixel_values.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        samples = torch.arange(n, device=pixel_values.device)[:, None, None, None]
        planes = torch.arange(channels, device=pixel_values.device)[None, :, None, None]
        return padded[samples, planes, rows[:, None, :, None], columns[:, None, None, :]]

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor | None = None) -> Tensor:
        column = torch.tensor(values)[:, None, None]
        return column if like is None else column.to(like)
