"""Trainings with ``torch.compile``: the round runs uncompiled, and what was compiled before it is forgotten."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hap_hf.errors import UnsupportedModelError
from hap_hf.host import inside_compiled, is_compiled, is_compiled_in_place


def check_compiled(trainer: Trainer, model: nn.Module) -> None:
    """Check that what the training runs is ``model`` itself, compiled as a whole or not.

    Args:
        trainer: The Trainer, ready to train.
        model: Its model.

    Raises:
        UnsupportedModelError: If the model came compiled, or its parts are compiled one by one.
    """
    inner: Any = trainer.model_wrapped
    # Wrappers may be in either order: compiled inside of DistributedDataParallel, or the other way round.
    while inner is not model and (is_compiled(inner) or isinstance(inner, DistributedDataParallel)):
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inside_compiled(inner)
    if inner is not model or any(is_compiled(module) for module in model.modules()):
        raise UnsupportedModelError(
            "HessianPruner needs the weights under their own names, and this model, or parts of it, came compiled by "
            "torch.compile or are compiled one by one (ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION); give the Trainer "
            "the model as it is, and torch_compile=True in its arguments"
        )


@contextmanager
def uncompiled(trainer: Trainer) -> Generator[None]:
    """Run the model of ``trainer`` uncompiled inside the block, and let it be compiled anew afterwards.

    Second derivatives and the hooks of discovery do not go through compiled code. What was compiled for the weights
    from before would count towards torch's limit of recompilations, behind which nothing is compiled any more.

    Args:
        trainer: A Trainer whose model may be compiled as a whole or in place.
    """
    modules = trainer.model_wrapped.modules()
    if not any(is_compiled(module) or is_compiled_in_place(module) for module in modules):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
    # Skipped after an error: the model is then the old one, for which the compiled code still holds.
    torch.compiler.reset()
