"""Training the implants alone."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn
from torch.optim import Optimizer

from hap_hf.errors import ConfigError
from hap_hf.layers.bypass import Bypass
from hap_hf.layers.projection import has_implant, implant_tensors


def train_only_implants_(
    model: nn.Module, also: Iterable[str] = (), *, optimizer: Optimizer | None = None
) -> tuple[str, ...]:
    """Freeze everything in ``model`` but its implants, as a cheap way to recover what pruning cost.

    Frozen parameters lose their gradients, so that nothing left over from before moves them: torch's optimizers skip
    parameters without one, weight decay and momentum included. Biases belong to the layer and are frozen, and so are
    heads that are new; ``also`` names what shall be trained as well. Statistics of batch norms are no parameters and
    still follow the data. ``model.requires_grad_(True)`` takes all of it back.

    Implants that began silent (``implant_init="zero"``) get no gradient like this: what reads them is zero and frozen.

    Args:
        model: A pruned model with implants.
        also: Glob patterns of further modules or parameters to train, such as ``"classifier"`` or ``"*.bias"``.
        optimizer: A torch optimizer of the model that shall go on, not a wrapper around one; it forgets its state of
            what is frozen.

    Returns:
        The names of the parameters that are trained.

    Raises:
        ConfigError: If the model has no implants, or a pattern matches nothing in it; nothing is changed then.
    """
    # By identity, as a parameter may be held under several names.
    trained = {
        id(module.get_parameter(leaf))
        for module in model.modules()
        if has_implant(module)
        for leaf in implant_tensors(module)
    }
    trained |= {id(p) for module in model.modules() if isinstance(module, Bypass) for p in module.parameters()}
    if not trained:
        raise ConfigError(
            f"expected a model with implants to train alone, and this {type(model).__name__} has none; prune it with "
            "implant_ratio above 0 or implants='auto', or train all of it"
        )
    trained |= {id(p) for p in _matching(model, checked_patterns(model, also))}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad:
            names.append(name)
            continue
        parameter.grad = None
        if optimizer is not None:
            optimizer.state.pop(parameter, None)  # moments of what is frozen only take memory
    return tuple(names)


def checked_patterns(model: nn.Module, also: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns of what is to be trained beside the implants.

    Args:
        model: The model, pruned or to be.
        also: Glob patterns of modules or parameters.

    Returns:
        The patterns.

    Raises:
        ConfigError: If they are no list of patterns, or one matches nothing.
    """
    if isinstance(also, str):
        raise ConfigError(f"expected a list of patterns to train beside the implants, got {also!r}; write [{also!r}]")
    patterns = tuple(also)
    unmatched = [p for p in patterns if not _matching(model, [p])]
    if unmatched:
        names = [name for name, _ in model.named_children()]
        raise ConfigError(
            f"patterns {unmatched} match no module with parameters and no parameter of {type(model).__name__}, whose "
            f"modules are {names[:6]} and what lies in them; see model.named_parameters()"
        )
    return patterns


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters that a pattern matches, or one of the modules around which it matches."""
    found = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        paths = list(accumulate(name.split("."), "{}.{}".format))  # "a", "a.b", "a.b.weight"
        if any(fnmatchcase(path, pattern) for path in paths for pattern in patterns):
            found.append(parameter)
    return found
