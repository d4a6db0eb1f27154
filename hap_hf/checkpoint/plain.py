"""Saving and loading modules that are none of transformers: weights in safetensors, the plan as JSON, no pickle."""

import json
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel

from hap_hf.checkpoint.files import check_sizes
from hap_hf.checkpoint.parts import store_plan_
from hap_hf.errors import PlanFormatError, PlanMismatchError, UnsupportedModelError
from hap_hf.model.bare import check_bare
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.plan import PruningPlan
from hap_hf.report.files import write_whole
from hap_hf.surgery import apply_plan_
from hap_hf.surgery.calibration import ImplantInit

_WEIGHTS, _PLAN = "model.safetensors", "plan.json"
_LARGEST = 2**28  # bytes of a plan, before JSON is parsed


def save_plain(model: nn.Module, plan: PruningPlan, directory: Path) -> None:
    """Write the weights and the plan.

    Args:
        model: The pruned module.
        plan: Everything that was done to it since it was dense.
        directory: Folder to write to; made where it does not exist.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The plan goes last: weights without one are refused, as what a full disk leaves behind.
    (directory / _PLAN).unlink(missing_ok=True)
    write_whole(directory / _WEIGHTS, partial(_save_weights, model))
    text = json.dumps(plan.to_dict())
    write_whole(directory / _PLAN, partial(Path.write_text, data=text, encoding="utf-8"))


def _save_weights(model: nn.Module, file: Path) -> None:
    save_model(model, str(file))  # tied weights once


def load_pruned_(model: nn.Module, directory: str | Path) -> PruningPlan:
    """Make a dense module the pruned one that :func:`save_pruned` wrote, in place: its shapes, then its weights.

    For modules of torchvision, segmentation libraries or your own. Models of transformers are loaded by
    ``from_pretrained``. Nothing in the folder can run code. After an error the module is as it was.

    Args:
        model: The module as it was built before pruning, with any weights, of any dtype and device.
        directory: Folder with ``model.safetensors`` and ``plan.json``.

    Returns:
        The plan, which the module now carries.

    Raises:
        PlanFormatError: If ``plan.json`` is missing or no plan.
        PlanMismatchError: If the plan or the weights are those of another module.
        UnsupportedModelError: If it is a model of transformers, or no bare module.

    Example:
        >>> import tempfile
        >>> import hap_hf, torch
        >>> from hap_hf import HapConfig
        >>> def build(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model, x = build(), torch.randn(6, 4)
        >>> report = hap_hf.prune(model, [(x, torch.arange(6) % 4)], HapConfig(prune_ratio=0.5, progress=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hap_hf.save_pruned(model, folder)
        ...     again = build()
        ...     plan = hap_hf.load_pruned_(again, folder)
        >>> torch.equal(again(x), model(x))
        True
    """
    if isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a model of transformers; load it by {type(model).__name__}.from_pretrained"
        )
    check_bare(model)
    weights, plan = Path(directory) / _WEIGHTS, _read_plan(Path(directory) / _PLAN)
    if not weights.is_file():
        raise PlanMismatchError(f"expected {_WEIGHTS} beside {_PLAN} in {str(directory)!r}, got none")
    check_sizes(plan, [str(weights)])
    with undone_on_error(model):
        apply_plan_(model, plan, init=ImplantInit.ZERO)
        _check_shapes(model, weights)
        load_model(model, str(weights))  # with names and shapes checked, nothing is left that could fail half-way
        store_plan_(model, plan)
    return plan


def _read_plan(file: Path) -> PruningPlan:
    """Return the plan of a file from a source that need not be trusted."""
    if not file.is_file():
        raise PlanFormatError(
            f"expected a folder that save_pruned wrote, got none with a {_PLAN}: {str(file.parent)!r}"
        )
    if file.stat().st_size > _LARGEST:
        raise PlanFormatError(f"{_PLAN} has {file.stat().st_size} bytes, at most {_LARGEST} are read")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanFormatError(f"{_PLAN} is no JSON: {error}") from error
    return PruningPlan.from_dict(data)


def _check_shapes(model: nn.Module, file: Path) -> None:
    """Check that a file holds a tensor of the same shape and dtype for each of a module's, tied ones once."""
    own: dict[int, set[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        own.setdefault(id(tensor), set()).add(name)
    try:
        with safe_open(str(file), framework="pt") as stored:
            found = {k: (list(s.get_shape()), s.get_dtype()) for k in stored.keys() for s in [stored.get_slice(k)]}  # noqa: SIM118
    except SafetensorError as error:
        raise PlanMismatchError(f"{file.name} holds no tensors in safetensors: {error}") from error
    wrong = [f"{n}: not expected" for n in sorted(found.keys() - tensors.keys())]
    for names in own.values():
        there = sorted(names & found.keys())
        shape = list(tensors[min(names)].shape)
        if not there:
            wrong.append(f"{min(names)}: expected shape {shape}, got none of that name")
        wrong += [f"{n}: expected shape {shape}, got {found[n][0]}" for n in there if found[n][0] != shape]
    if wrong:
        raise PlanMismatchError(
            f"the weights in {file.name} are not those of this {type(model).__name__} after the plan beside them; "
            "build the module as it was before pruning, and take both files from one save:\n  "
            + "\n  ".join(wrong[:10])
        )
