"""Rademacher probes that depend on a seed and on nothing else."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ProbeSource = Callable[[int, int], Mapping[str, Tensor]]
"""Maps a batch's index and a probe's index to a probe: a sign for every entry of every tensor."""


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of ``key``, independent of the global random state.

    Args:
        key: Anything that tells this stream of numbers from others.

    Returns:
        The generator.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


def rademacher(tensors: Mapping[str, Tensor], seed: int, batch: int, probe: int) -> dict[str, Tensor]:
    r"""Return independent fair signs, one for each entry of each tensor.

    The bits are drawn on the CPU, 64 signs a random number, and unpacked on the tensor's device, so that a seed means
    the same probe on every device and in every dtype. Tensors take their bits in the order of their names.

    Args:
        tensors: Tensors to draw signs for, by name.
        seed: Seed of the whole estimate.
        batch: Index of the batch.
        probe: Index of the probe within the batch.

    Returns:
        For each name a tensor of ``-1`` and ``1`` with the shape, dtype and device of the one given.

    Example:
        >>> signs = rademacher({"weight": torch.zeros(2, 3)}, seed=0, batch=0, probe=0)["weight"]
        >>> signs.shape, bool((signs.abs() == 1).all())
        (torch.Size([2, 3]), True)
    """
    generator = seeded_generator(seed, batch, probe)
    signs = {}
    for name in sorted(tensors):  # one stream for all, so the order must not be that of a dictionary
        like = tensors[name]
        words = torch.empty(-(-like.numel() // 64), dtype=torch.int64, device="cpu")
        words.random_(-(2**63), None, generator=generator)  # without bounds the highest bit would always be 0
        octets = words.to(like.device).view(torch.uint8).int()
        signs[name] = _signs_of_octets(like).index_select(0, octets).flatten()[: like.numel()].view(like.shape)
    return signs


def _signs_of_octets(like: Tensor) -> Tensor:
    """Return the eight signs that each byte stands for, ``[256, 8]``; looking them up takes one pass over memory."""
    octets = torch.arange(256, device=like.device)[:, None]
    bits = octets.bitwise_right_shift(torch.arange(8, device=like.device)).bitwise_and(1)
    return bits.mul(2).sub(1).to(like.dtype)
