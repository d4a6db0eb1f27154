"""Optimizers in a training that is pruned: which can be carried over to new parameters, and which are refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer

from hap_hf.errors import UnsupportedModelError
from hap_hf.host import gradient_hooks

_REFUSED = {
    "apollo_torch": "keeps its state in a space of low rank",
    "bitsandbytes": "keeps its state quantized or in pages of its own",
    "galore_torch": "keeps its state in a space of low rank",
    "lomo_optim": "changes weights during the backward pass",
    "torch_npu": "keeps all parameters in one tensor",
    "torchao": "keeps its state quantized",
}
"""What optimizers of some packages do that no cut parameter could follow, by package."""

_ADVICE = (
    "HessianPruner puts smaller parameters into it and cuts what it remembers of them: train with optim='adamw_torch', "
    "'adamw_torch_fused', 'adafactor', 'sgd', 'rmsprop' or 'adagrad', or prune first with hap_hf.prune(model, batches, "
    "config) and train the smaller model"
)


def bare_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that holds the parameters.

    Args:
        optimizer: The Trainer's, which accelerate may have wrapped.

    Returns:
        The one inside.
    """
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Check that ``optimizer`` can go on with other parameters.

    Args:
        optimizer: The Trainer's, which accelerate may have wrapped.
        model: The Trainer's model.

    Raises:
        UnsupportedModelError: If it is known that it cannot, or if it or a parameter keeps what surgery would not see.
    """
    optimizer = bare_optimizer(optimizer)
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedModelError(f"expected an optimizer derived from torch.optim.Optimizer, got {name}; {_ADVICE}")
    # Derived classes as well, by the package of any class they come from.
    for kind in type(optimizer).__mro__:
        reason = _REFUSED.get(kind.__module__.partition(".")[0])
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}, which cannot be pruned with the weights; {_ADVICE}")
    for attribute, value in _own_attributes(optimizer):
        for kept in _leaves(value):
            # Tensors of one entry are learning rates and the like.
            if isinstance(kept, (Optimizer, nn.Module)) or (isinstance(kept, Tensor) and kept.numel() > 1):
                raise UnsupportedModelError(
                    f"{name} keeps a {type(kept).__name__} in {attribute}, which would go on with the parameters from "
                    f"before pruning; {_ADVICE}"
                )
    # Optimizers that step during the backward pass, for one, leave such hooks.
    for path, parameter in model.named_parameters():
        if gradient_hooks(parameter):
            raise UnsupportedModelError(
                f"{path} has a hook on its gradient, which would be lost with the parameter; put it on the module "
                "(register_full_backward_hook), train without it, or prune first with hap_hf.prune(model, batches, "
                "config)"
            )


def _own_attributes(optimizer: Optimizer) -> Iterator[tuple[str, object]]:
    """Yield what an optimizer holds apart from its parameters and their state, with its name."""
    for attribute, value in vars(optimizer).items():
        if attribute not in {"param_groups", "state"}:
            yield attribute, value
    for group in optimizer.param_groups:
        for option, value in group.items():
            if option != "params":
                yield f"the option {option!r}", value


def _leaves(value: Any) -> Iterator[object]:
    """Yield everything inside of containers, keys included: some optimizers keep options by parameter."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
