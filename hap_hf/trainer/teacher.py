"""The model that a pruned one learns from: kept once, and in a file, so that a resumed training has the same one."""

import copy
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hap_hf.errors import ConfigError
from hap_hf.report.files import write_whole

FILE = "model.safetensors"


def frozen_copy(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """Return a copy of a model that answers and never learns.

    Args:
        model: The model, which is left as it is.
        dtype: Dtype of the copy's weights; the model's own by default.
        device: Where the copy goes.

    Returns:
        The copy, in eval mode.
    """
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None  # the copy needs none
    try:
        teacher = copy.deepcopy(model)
    finally:
        for p, grad in zip(model.parameters(), gradients, strict=True):
            p.grad = grad
    return teacher.to(device=device, dtype=dtype).requires_grad_(False).eval()


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters take no memory.

    Args:
        model: The model.

    Returns:
        The copy, whose parameters are on the ``meta`` device.
    """
    with torch.no_grad():
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
        }
    return copy.deepcopy(model, memo=cast(dict[int, object], empty))


def save_teacher(teacher: nn.Module, folder: Path) -> None:
    """Write the weights of a teacher.

    Args:
        teacher: The teacher.
        folder: Where to; made where it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Tied ones once, under their first name.
    named = {**dict(teacher.named_parameters()), **_own_buffers(teacher)}
    write_whole(folder / FILE, partial(save_file, {n: t.detach().contiguous() for n, t in named.items()}))


def load_teacher(skeleton: nn.Module, folder: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """Return the teacher that :func:`save_teacher` wrote.

    Args:
        skeleton: What :func:`skeleton_of` returned for the dense model.
        folder: Where it was written.
        dtype: Dtype of its weights.
        device: Where it goes.

    Returns:
        The teacher.

    Raises:
        ConfigError: If there is none, or it has other weights than the dense model.
    """
    advice = (
        "resume with the dense model and in the same output_dir, in a training that saves checkpoints, or pass the "
        "dense model: Distill(teacher=...)"
    )
    try:
        weights = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the training was pruned before, and its teacher is not in {str(folder)!r} ({type(error).__name__}); "
            f"{advice}"
        ) from error
    teacher = copy.deepcopy(skeleton)
    named = {**dict(teacher.named_parameters()), **_own_buffers(teacher)}
    expected, found = ({n: tuple(t.shape) for n, t in each.items()} for each in (named, weights))
    if expected != found:
        wrong = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
        raise ConfigError(
            f"the teacher in {str(folder)!r} is not the Trainer's model before pruning: {wrong[0]} is "
            f"{found.get(wrong[0])}, and {expected.get(wrong[0])} there; {advice}"
        )
    # By object, as tied parameters have several names and the file knows one.
    stored = {id(named[n]): weights[n] for n in weights}
    everything = teacher.state_dict(keep_vars=True)
    teacher.load_state_dict({n: stored[id(t)] for n, t in everything.items()}, assign=True)
    return teacher.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _own_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that a state dict holds, by name."""
    known = {id(t) for t in model.state_dict(keep_vars=True).values()}
    return {n: b for n, b in model.named_buffers() if id(b) in known}
