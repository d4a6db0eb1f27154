"""Leaving a model exactly as it was found."""

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hap_hf.host import own_buffers

# The flags of transformers and timm. timm's is obeyed in eval mode too.
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing")


@contextmanager
def preserved(
    model: nn.Module,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    plain_attention: bool = True,
    without_checkpointing: bool = True,
) -> Generator[None, None, None]:
    """Make ``model`` ready for derivatives, and put everything back however the block ends.

    Inside, the model is in eval mode, only ``tensors`` require gradients and no gradient is stored. Attention runs on
    the math kernel, the only one that can be differentiated twice and that a counter sees into, and activations are not
    checkpointed, as reentrant checkpoints hide weights from ``torch.autograd.grad``; each can be left as it is.
    Afterwards training flags, ``requires_grad``, ``.grad``, buffers, checkpointing flags and
    the global random states of torch, numpy and Python are those from before, also after an exception or Ctrl-C.

    Args:
        model: Any model.
        tensors: Parameters to differentiate with respect to, by name; none by default.
        plain_attention: Whether attention runs on the math kernel.
        without_checkpointing: Whether activations are kept that the model would otherwise compute again.
    """
    modules = list(model.modules())
    parameters = list(model.parameters())
    training = [m.training for m in modules]
    checkpointing = [
        (m, a) for m in modules for a in _CHECKPOINTING if without_checkpointing and getattr(m, a, False) is True
    ]
    buffers = [dict(own_buffers(m)) for m in modules]
    # Both the buffers and their values: a forward pass may write to one, or put another in its place.
    values = {id(b): b.detach().clone() for own in buffers for b in own.values() if b is not None}
    gradients = [(p.requires_grad, p.grad) for p in parameters]
    wanted = {id(t) for t in (tensors or {}).values()}
    python, legacy = random.getstate(), np.random.get_state()  # ruff: ignore[numpy-legacy-random]
    try:
        renew_caches(model)
        model.eval()
        for module, attribute in checkpointing:
            setattr(module, attribute, False)
        for p in parameters:
            p.requires_grad_(id(p) in wanted)
            p.grad = None  # a loss that calls backward() must not add to the gradients found
        with (
            torch.random.fork_rng(_cuda_devices(model)),
            sdpa_kernel(SDPBackend.MATH) if plain_attention else nullcontext(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # ruff: ignore[numpy-legacy-random]
        renew_caches(model)
        for module, flag, own in zip(modules, training, buffers, strict=True):
            module.training = flag
            own_buffers(module).clear()
            own_buffers(module).update(own)
        with torch.no_grad():
            for buffer in (b for own in buffers for b in own.values() if b is not None and not b.is_meta):
                if not torch.equal(buffer, values[id(buffer)]):
                    buffer.copy_(values[id(buffer)])
        for module, attribute in checkpointing:
            setattr(module, attribute, True)
        for p, (requires_grad, grad) in zip(parameters, gradients, strict=True):
            p.requires_grad_(requires_grad)
            p.grad = grad


def restart_random_numbers(model: nn.Module, seed: int = 0) -> None:
    """Let the global random numbers of torch, numpy and Python begin anew, for what draws some in eval mode too.

    Models choose patches or points at random (ViLT, Mask2Former); two runs are only comparable with the same choice.
    To be called where :func:`preserved` puts the states back.

    Args:
        model: The model that may draw them.
        seed: Where they begin.
    """
    # Only on devices of the model, whose states are put back.
    torch.default_generator.manual_seed(seed)
    for index in _cuda_devices(model):
        torch.cuda.default_generators[index].manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # ruff: ignore[numpy-legacy-random]


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def renew_caches(model: nn.Module) -> None:
    """Let modules drop what they keep from weights while in eval mode, such as tables of attention biases.

    Args:
        model: The model; all training flags stay.
    """
    modules = list(model.modules())
    training = [m.training for m in modules]
    # Going through train mode is how torch modules are told, and those that keep something act on it.
    model.train()
    for module, flag in zip(modules, training, strict=True):
        module.training = flag
