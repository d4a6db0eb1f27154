"""What the files of a checkpoint must be before surgery believes a plan that came with them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from hap_hf.errors import PlanMismatchError
from hap_hf.names.plan import PruningPlan

SMALL = 2**20
"""Rows and columns that are cut without asking how large the weights are."""


def check_files(files: Iterable[str]) -> None:
    """Check that weights come from safetensors, whose reader runs no code. No file is opened.

    Args:
        files: The files of weights.

    Raises:
        PlanMismatchError: If one is something else, such as a pickle.
    """
    other = next((Path(file).name for file in files if not file.endswith(".safetensors")), None)
    if other is not None:
        raise PlanMismatchError(
            f"expected the weights of a pruned model in safetensors, got {other!r}, which could run code; save its "
            "tensors with safetensors.torch.save_file where that does no harm"
        )


def check_sizes(plan: PruningPlan, files: Sequence[str]) -> None:
    """Check that no stage handles more rows and columns than the checkpoint has bytes.

    A model without storage can have any size that a few characters of ``config.json`` give it, and surgery takes time
    and memory for each row of a tensor that it cuts.

    Args:
        plan: The plan that came with the checkpoint.
        files: The files of weights; without any the weights lie in memory, and nothing is checked.

    Raises:
        PlanMismatchError: If one does.
    """
    # A row has at least a byte, so an honest plan cannot cut more rows than that.
    stored = sum(Path(file).stat().st_size for file in files)
    for stage in plan.stages if files else ():
        rows = sum({(s.tensor, s.dim): s.shape[s.dim] for g in stage for s in g.group.slices}.values())
        if rows > max(stored, SMALL):
            raise PlanMismatchError(
                f"the plan in config.json cuts tensors of {rows} rows and columns, and the checkpoint has {stored} "
                "bytes of weights; take both from one save"
            )
