"""Leaving a model exactly as it was found."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def preserved(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Put ``model`` in eval mode with gradients for ``tensors`` only, and put everything back.

    LEAD'S PLACEHOLDER: whoever owns this file may replace it, keeping this signature.
    """
    training = [(m, m.training) for m in model.modules()]
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(t) for t in (tensors or {}).values()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        for p, _, _ in grads:
            p.requires_grad_(id(p) in wanted)
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for m, flag in training:
            m.training = flag
        for p, flag, grad in grads:
            p.requires_grad_(flag)
            p.grad = grad
