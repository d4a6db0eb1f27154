"""timm models inside transformers' wrapper, pruned ones included, so that they save, load and train as any other."""

from typing import Any, cast

import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hap_hf.checkpoint.parts import store_plan_
from hap_hf.checkpoint.record import check_described
from hap_hf.errors import UnsupportedModelError
from hap_hf.names.plan import PruningPlan
from hap_hf.surgery import apply_plan_

_PREFIX = "timm_model."


def wrap_timm(
    model: nn.Module, plan: PruningPlan | None = None, *, architecture: str | None = None, **model_args: Any
) -> TimmWrapperForImageClassification:
    """Return ``model`` inside a ``TimmWrapperForImageClassification``, which ``save_pretrained`` can save.

    The wrapper's config says how timm builds the dense model, and what was done to it. It is tried before it is
    believed: timm's own model of these settings, pruned by the same plan, must have the same tensors.

    Args:
        model: A classifier made by ``timm.create_model``, pruned or not; it is not copied.
        plan: What was done to it since it was dense, as in ``PruningReport.plan``; None for a dense model.
        architecture: Name for ``timm.create_model``; by default what the model's own ``pretrained_cfg`` says.
        **model_args: Further settings that the model was made with, without ``num_classes``.

    Returns:
        The wrapper around ``model``.

    Raises:
        UnsupportedModelError: If the model has no known architecture or no classes, or timm does not build it from
            these settings.
        PlanMismatchError: If the plan does not describe the model.

    Example:
        >>> import timm
        >>> dense = timm.create_model("resnet10t", num_classes=10)
        >>> wrapped = wrap_timm(dense)
        >>> wrapped.config.architecture, wrapped.timm_model is dense
        ('resnet10t', True)
    """
    card = cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})
    architecture = architecture or card.get("architecture")
    num_classes = getattr(model, "num_classes", None)
    if not isinstance(architecture, str) or not isinstance(num_classes, int) or num_classes < 1:
        raise UnsupportedModelError(
            f"expected a timm classifier that knows its architecture and number of classes, got a "
            f"{type(model).__name__} with architecture={architecture!r} and num_classes={num_classes!r}; pass "
            "architecture= the name that timm.create_model takes"
        )
    # There it is the number of classes of the pretrained weights, which need not be this model's.
    card = {k: v for k, v in card.items() if k != "num_classes"}
    settings: dict[str, Any] = {"architecture": architecture, "num_labels": num_classes, "pretrained_cfg": card}
    if model_args:
        settings["model_args"] = dict(model_args)
    config = TimmWrapperConfig(**settings)
    try:
        # Only names and shapes of the tensors are compared.
        with torch.device("meta"):
            wrapper = TimmWrapperForImageClassification(config)
    except (RuntimeError, TypeError, ImportError) as error:
        raise UnsupportedModelError(f"timm builds no {architecture!r} with {model_args}: {error}") from error
    if plan is not None:
        apply_plan_(wrapper.timm_model, plan)
    expected = {name: tuple(t.shape) for name, t in wrapper.timm_model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if expected != got:
        differ = sorted(n for n in {*expected, *got} if expected.get(n) != got.get(n))
        raise UnsupportedModelError(
            f"timm.create_model({architecture!r}, num_classes={num_classes}, **{model_args}), pruned by "
            f"{'the plan' if plan is not None else 'no plan'}, is another model: {len(differ)} tensors differ, as "
            f"{differ[0]}, expected {expected.get(differ[0])}, got {got.get(differ[0])}; pass the settings that the "
            "model was made with, and the plan if it is pruned"
        )
    wrapper.timm_model = model
    wrapper.train(model.training)
    if plan is not None:
        # Inside the wrapper all names begin with that of the timm model, which may carry the same plan already.
        named = plan.renamed(_PREFIX.__add__)
        check_described(wrapper, named)
        store_plan_(wrapper, named)
    return wrapper
