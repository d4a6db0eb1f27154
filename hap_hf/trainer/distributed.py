"""Trainings that run in several processes: what the callback works with, and what else it has to keep in step."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from hap_hf.errors import UnsupportedModelError
from hap_hf.evidence.processes import Processes
from hap_hf.trainer.host import averaged_parameters, build_anew_, communication_hooks

_SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "XLA": "XLA"}
"""Kinds of distributed training, by accelerate's name, in which a process does not hold a whole torch model."""


def check_arguments(args: TrainingArguments) -> None:
    """Check that a training with these arguments leaves every process a whole model of its own.

    Args:
        args: The Trainer's arguments.
    """
    _refuse({
        "FSDP": bool(args.fsdp),
        "DeepSpeed": args.deepspeed is not None,
        f"{args.n_gpu} GPUs in one process": args.n_gpu > 1,  # torch.nn.DataParallel
    })


def check_wrapping(trainer: Trainer, model: nn.Module) -> None:
    """Check that the Trainer has prepared nothing that cuts its model into parts, or that surgery would break.

    Args:
        trainer: The Trainer, ready to train.
        model: Its model.
    """
    accelerator = trainer.accelerator
    parallelism = getattr(accelerator, "parallelism_config", None)
    wrapper = _wrapper_of(trainer)
    hooks = [] if wrapper is None else [state for _, state in communication_hooks(wrapper)]
    kind = accelerator.distributed_type.value
    whole = not any(isinstance(p, DTensor) for p in model.parameters()) and (getattr(model, "tp_size", None) or 1) == 1
    _refuse({
        _SHARDED.get(kind, ""): kind in _SHARDED,  # `accelerate launch` sets it where the arguments say nothing of it
        "context parallelism": bool(getattr(parallelism, "cp_enabled", False)),
        "sequence parallelism": bool(getattr(parallelism, "sp_enabled", False)),
        "tensor parallelism": not whole or bool(getattr(parallelism, "tp_enabled", False)),
        f"{trainer.args.world_size} processes without DistributedDataParallel": trainer.args.world_size > 1
        and wrapper is None,
        "a communication hook that remembers gradients": any(
            not isinstance(state, (type(None), ProcessGroup)) for state in hooks
        ),
    })


def _refuse(found: dict[str, bool]) -> None:
    """Raise if one of these kinds of training is used."""
    for name, used in found.items():
        if used:
            raise UnsupportedModelError(
                "HessianPruner works on a whole model in each process, alone or with DistributedDataParallel, and this "
                f"training uses {name}; prune first with hap_hf.prune(model, batches, config) and train the smaller "
                "model"
            )


def _wrapper_of(trainer: Trainer) -> DistributedDataParallel | None:
    # Compiled, the wrapper is inside of something else.
    found = (m for m in trainer.model_wrapped.modules() if isinstance(m, DistributedDataParallel))
    return next(found, None)


def processes_of(args: TrainingArguments) -> Processes:
    """Return the processes of a training.

    Args:
        args: The Trainer's arguments.

    Returns:
        The processes, as this one sees them.
    """
    return Processes(args.process_index, args.world_size, args.device)


@contextmanager
def pruning_together(trainer: Trainer, model: nn.Module) -> Generator[Processes]:
    """Prune ``model`` inside the block in all processes of the training, and let them train the result together.

    ``DistributedDataParallel`` averages the gradients of the parameters that it was built with, and would leave those
    that surgery put in their place to each process.

    Args:
        trainer: A Trainer that is ready to train.
        model: Its model, not wrapped.

    Yields:
        The processes of the training.
    """
    processes = processes_of(trainer.args)
    wrapper = _wrapper_of(trainer)
    if wrapper is not None and wrapper.broadcast_buffers:
        # Batch norms have counted other samples in each process since the first one's buffers were last copied.
        processes.adopt_first_("buffers", model.buffers())
    yield processes
    rewrap_(trainer)


def rewrap_(trainer: Trainer, *, anew: bool = False) -> None:
    """Let the Trainer's ``DistributedDataParallel`` average the gradients of the parameters that its module has now.

    It is built anew with accelerate's settings, in place: the training loop holds it in a local variable.

    Args:
        trainer: A Trainer whose model may have other parameters than when it was wrapped.
        anew: Whether to do so with the same parameters, too, of which others require gradients now.
    """
    wrapper = _wrapper_of(trainer)
    if wrapper is None:
        return
    # By identity: parameters with the same values are others for the reducer.
    if not anew and list(map(id, averaged_parameters(wrapper))) == list(map(id, wrapper.module.parameters())):
        return
    handler = trainer.accelerator.ddp_handler
    build_anew_(wrapper, **(handler.to_kwargs() if handler is not None else {}))
