"""What a criterion is given, and the batches of it made ready."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hap_hf.config import HapConfig, Precision
from hap_hf.curvature import SampleBatch, rademacher
from hap_hf.curvature.batch_loss import check_counts
from hap_hf.evidence.batches import batch_size
from hap_hf.evidence.losses import LossFunction, batch_losses
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.model.state import preserved
from hap_hf.names.group import Group

_FP16_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class ScoringTask:
    """What a criterion is given.

    Args:
        model: The model that the groups were found in.
        groups: Units to score.
        batches: Keyword arguments of the model's forward with labels.
        config: The settings.
        loss_fn: Mean loss of the model on a batch.
        processes: The processes that score together; ``batches`` are the share of this one.
    """

    model: nn.Module
    groups: Sequence[Group]
    batches: Iterable[Mapping[str, Any]]
    config: HapConfig
    loss_fn: LossFunction
    processes: Processes = ALONE

    @contextmanager
    def ready(
        self, tensors: Mapping[str, Tensor], title: str, unit: str, ticks: int = 1, *, twice: bool = True
    ) -> Generator[Callable[[], object], None, None]:
        """Prepare the model for derivatives and show a progress bar inside the block.

        Args:
            tensors: What to differentiate with respect to, by name.
            title: What the bar is called.
            unit: What it counts.
            ticks: How many of them there are in a batch.
            twice: Whether the model is differentiated twice; see :func:`~hap_hf.model.state.preserved`.

        Yields:
            The function that moves the bar by one.
        """
        most = self.config.max_batches
        num_batches = min(length_hint(self.batches), most or length_hint(self.batches))
        with (
            preserved(self.model, tensors, twice=twice),
            # The caller's autocast must not reach into the derivatives.
            torch.autocast(next(self.model.parameters()).device.type, enabled=False),
            tqdm(total=num_batches * ticks or None, desc=title, unit=unit, disable=not self.config.progress) as bar,
        ):
            yield bar.update

    def loss_scale(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the loss scale to begin with.

        Args:
            tensors: What is differentiated with respect to, by name.

        Returns:
            1 unless anything is in float16.
        """
        half = self.config.precision is Precision.FP16 or any(t.dtype == torch.float16 for t in tensors.values())
        return _FP16_LOSS_SCALE if half else 1.0

    def signs(self, like: Mapping[str, Tensor], batch: int, probe: int) -> Mapping[str, Tensor]:
        """Return random signs, which do not depend on how many processes share the batches.

        Args:
            like: Tensors to draw signs for, by name.
            batch: Index of the batch in the share of this process.
            probe: Index of the probe within the batch.

        Returns:
            Signs in the shapes of the tensors.
        """
        return rademacher(like, self.config.seed, self.processes.number(batch), probe)

    def total(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sums over the batches of all processes.

        Args:
            sums: Sums over the batches of this one, by name.

        Returns:
            The sums.
        """
        return self.processes.summed("scores", sums)

    def losses(self) -> Iterator[tuple[Callable[[], Tensor], int]]:
        """Yield for each batch a function that computes its mean loss, and the number of loss terms.

        Returns:
            The pairs.
        """
        return self._losses_of(islice(self.batches, self.config.max_batches))

    def samples(self) -> Iterator[SampleBatch]:
        """Yield the batches so that their samples can also be computed alone.

        Yields:
            The batches.
        """
        current: list[Mapping[str, Any]] = []

        def remembered() -> Iterator[Mapping[str, Any]]:
            for batch in islice(self.batches, self.config.max_batches):
                current[:] = [batch]
                yield batch

        for loss, num_terms in self._losses_of(remembered()):
            (batch,) = current
            size = num_samples(batch)
            yield SampleBatch(loss, num_terms, size, partial(self._single, batch, size))

    def _single(self, batch: Mapping[str, Any], size: int, n: int) -> SampleBatch:
        """Return the batch of sample n of ``size`` alone."""
        one = tree_map_only(Tensor, lambda t: t[n : n + 1] if t.dim() and t.shape[0] == size else t, dict(batch))
        return next(replace(self, batches=[one]).samples())

    def _losses_of(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Callable[[], Tensor], int]]:
        return batch_losses(self.model, batches, self.loss_fn, self.config.precision)


def num_samples(batch: Mapping[str, Any]) -> int:
    """Return the number of samples of a batch with labels: their leading size, or that of its first tensor.

    Args:
        batch: Keyword arguments of the model's forward.

    Returns:
        The number.
    """
    labels = batch.get("labels")
    return labels.shape[0] if isinstance(labels, Tensor) and labels.dim() else batch_size(batch)


def mean_loss(task: ScoringTask) -> float:
    """Return the mean of all loss terms of a task's batches.

    Args:
        task: The model and the batches.

    Returns:
        The mean; infinite where it is not finite.

    Raises:
        BatchError: If there are no batches, or no loss terms in them.
    """
    total, seen, num_terms = torch.zeros((), dtype=torch.float64, device="cpu"), 0, 0
    with task.ready({}, "loss", "batch", twice=False) as tick, torch.no_grad():
        for loss, number in task.losses():
            seen, num_terms = seen + 1, num_terms + number
            if number:
                total += number * loss().double().cpu()
            tick()
    sums = task.processes.summed("losses", {"loss": total, "counts": torch.tensor([seen, num_terms], device="cpu")})
    check_counts(*sums["counts"].tolist())
    mean = sums["loss"].item() / sums["counts"][1].item()
    return mean if math.isfinite(mean) else math.inf
