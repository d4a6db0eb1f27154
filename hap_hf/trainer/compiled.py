"""Trainings with ``torch.compile``: the round runs uncompiled, and what was compiled before it is forgotten."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from hap_hf.errors import UnsupportedModelError


def check_compiled(trainer: Trainer, model: nn.Module) -> None:
    """Check that what the training runs is ``model`` itself, compiled as a whole or not.

    Args:
        trainer: The Trainer, ready to train.
        model: Its model.

    Raises:
        UnsupportedModelError: If the model came compiled, or its parts are compiled one by one.
    """
    inner: Any = trainer.model_wrapped
    while inner is not model and (_is_compiled(inner) or isinstance(inner, DistributedDataParallel)):
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
    if inner is not model or any(_is_compiled(module) for module in model.modules()):
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
        trainer: The Trainer.

    Yields:
        Nothing.
    """
    modules = trainer.model_wrapped.modules()
    if not any(_is_compiled(module) or module._compiled_call_impl is not None for module in modules):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
