"""Parameters that surgery replaced, and optimizers that still hold them.

An optimizer that was made before goes on with tensors that are no longer in the model: the pruned layers would never
be trained again, in silence, while the rest learns. So the first step of such an optimizer raises.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from hap_hf.errors import StaleOptimizerError
from hap_hf.model.change import TensorChange

# Weak, so that old tensors are freed as soon as nobody but this module knows them.
_REPLACED = WeakTensorKeyDictionary()
_WATCHING = False


def note_replaced(changes: Iterable[TensorChange]) -> None:
    """Remember which parameters are no longer in a model.

    Args:
        changes: What surgery changed.
    """
    global _WATCHING
    # One hook for all optimizers of the process, and none before the first surgery.
    if not _WATCHING:
        register_optimizer_step_pre_hook(_check_step)
        _WATCHING = True
    for change in changes:
        if isinstance(change.old, nn.Parameter):
            _REPLACED[change.old] = change.name


def note_in_use(parameters: Iterable[Tensor]) -> None:
    """Forget what was noted of parameters that are in a model again.

    Args:
        parameters: The model's parameters.
    """
    for parameter in parameters if len(_REPLACED) else ():
        if parameter in _REPLACED:
            del _REPLACED[parameter]


def _check_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise before an optimizer steps that holds a parameter which surgery replaced."""
    if not len(_REPLACED):
        return
    held: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    stale = [_REPLACED[p] for p in held if p in _REPLACED]
    if stale:
        raise StaleOptimizerError(
            f"this {type(optimizer).__name__} holds {len(stale)} parameters that pruning replaced, {stale[0]} among "
            "them, so the pruned layers would not be trained; make the optimizer, or the Trainer, after pruning, or "
            "pass it along: hap_hf.prune(model, batches, config, optimizer=optimizer)"
        )
