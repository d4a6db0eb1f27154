"""Every private name of torch that is touched, and what transformers and accelerate leave on modules and configs.

Private names may change with any release, so no other file touches one, apart from ``trainer/host.py`` and
``checkpoint/host.py`` for what only these know. Seen in torch 2.9 to 2.15, transformers 5.17 to 5.24 and accelerate
1.1 to 1.15; a test goes through each of them on the versions that are installed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "BATCH_NORMS",
    "CONTAINERS",
    "HOOKS",
    "BatchNorm",
    "NormWithStatistics",
    "TorchDispatchMode",
    "attention_of",
    "call_hooks",
    "device_hook",
    "gradient_hooks",
    "inside_compiled",
    "is_compiled",
    "is_compiled_in_place",
    "own_buffers",
    "own_parameters",
    "own_tensors",
    "set_attention_",
    "times_changed",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "viewed",
]

NormWithStatistics = _NormBase
"""Base of batch and instance norms."""
BatchNorm = _BatchNorm
"""Base of batch norms."""
BATCH_NORMS = {
    torch.ops.aten.native_batch_norm.default: 5,
    torch.ops.aten.cudnn_batch_norm.default: 5,
    torch.ops.aten._native_batch_norm_legit_no_training.default: None,
}
"""Operations of batch norms, each with the place of its argument whether it trains; None for those that never do."""
CONTAINERS = ("_parameters", "_buffers", "_modules")
"""Attributes in which a module keeps what it is made of."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
"""Attributes in which a module keeps the hooks that run around its forward."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary in which a module keeps its parameters, none of which are those of other modules."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary in which a module keeps its buffers."""
    return module._buffers


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that a module keeps itself, by name.

    Yields:
        The pairs.
    """
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield name, tensor


def call_hooks(module: nn.Module) -> tuple[Any, Any]:
    """Return the dictionaries in which a module keeps the hooks that run around its forward."""
    return module._forward_hooks, module._forward_pre_hooks


def viewed(tensor: Tensor) -> Tensor | None:
    """Return the tensor that another one is a view of, None where it is no view."""
    return tensor._base


def times_changed(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return tensor._version


def gradient_hooks(parameter: Tensor) -> bool:
    """Return whether something waits for the gradient of a parameter."""
    kept: Any = parameter
    return bool(kept._backward_hooks or kept._post_accumulate_grad_hooks)


def is_compiled(module: object) -> bool:
    """Return whether ``torch.compile`` made the module."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def inside_compiled(module: Any) -> Any:
    """Return the module that ``torch.compile`` made another one of."""
    return module._orig_mod


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def device_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that moves the inputs of a module to its device, None where there is none."""
    return getattr(module, "_hf_hook", None)


def attention_of(config: object) -> str | None:
    """Return which kernel a config of transformers lets attention run on, None where it says nothing."""
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def set_attention_(config: Any, kernel: str | None) -> None:
    """Let attention of models of a config run on a kernel."""
    config._attn_implementation = kernel
