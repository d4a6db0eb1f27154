"""A model as in training, without what training leaves to chance."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hap_hf.layers.norms import keeps_statistics

_DROPOUTS = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
}
# Position of the probability among the arguments of functions that drop and do other things as well.
_PROBABILITY = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}


@contextmanager
def as_in_training(model: nn.Module) -> Generator[None]:
    """Let ``model`` take the paths of training inside the block, without dropout and with the statistics of its norms.

    Both would hide whether two models compute the same: dropout draws as many numbers as there are units, and
    statistics of a batch are those of whatever batch it is.

    Args:
        model: The model; its flags are put back.
    """
    modules = list(model.modules())
    flags = [m.training for m in modules]
    for module in modules:
        module.training = not keeps_statistics(module)
    try:
        with _WithoutDropout():
            yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


class FunctionLog(TorchFunctionMode):
    """Notes the names of the functions of torch that are called, in order, but for those that a log should not tell.

    Left out are dropout, attributes, and what gives no more than a number: neither makes two runs different ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note it."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _DROPOUTS | {"__get__", "__set__"} and isinstance(result, torch.Tensor) and result.dim():
            self.names.append(name)
        return result


class _WithoutDropout(TorchFunctionMode):
    """Lets dropout return what it is given."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with a probability of zero, where it has one."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        place = _PROBABILITY.get(name)
        if place is not None:
            args = (*args[:place], 0.0, *args[place + 1 :]) if len(args) > place else args
            if len(args) <= place:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
