"""What is measured on: a model, batches, a loss, an arithmetic and the processes that work together."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from hap_hf.curvature import SampleBatch, rademacher
from hap_hf.errors import BatchError, ConfigError, UnsupportedModelError
from hap_hf.evidence.batches import OWN_OUTPUTS, Batch, as_batch, as_given, called_with, few_samples
from hap_hf.evidence.facts import Facts
from hap_hf.evidence.losses import LossFunction, batch_losses, model_loss
from hap_hf.evidence.precision import Precision
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.evidence.progress import part
from hap_hf.evidence.samples import num_samples
from hap_hf.model.state import preserved
from hap_hf.names.checks import at_least, member

# Lifts gradients above float16's smallest number. A power of two rounds nothing; it is lowered on overflow.
_FP16_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Evidence:
    """What everything is measured on, checked and brought into form once.

    Args:
        model: The model, which every measurement leaves as found.
        batches: What the loss takes, with labels; each counts by its number of loss terms, see
            :func:`~hap_hf.evidence.losses.count_loss_terms`.
        loss_fn: Mean loss of a model over a batch's loss terms.
        precision: Arithmetic of the forward pass and its derivatives.
        seed: Seed of random signs and probes.
        progress: Whether to show progress bars.
        processes: The processes that measure together, with the same results; ``batches`` are the share of this one.
        given_loss: Whether the loss is the user's, which takes batches as they came.
        facts: What is known of the loss on these batches: nothing, until it was tried.
    """

    model: nn.Module
    batches: Sequence[Any]
    loss_fn: LossFunction = model_loss
    precision: Precision = Precision.FP32
    seed: int = 0
    progress: bool = True
    processes: Processes = ALONE
    given_loss: bool = False
    facts: Facts = field(default_factory=Facts)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFunction | None = None,
        precision: Precision | str = Precision.FP32,
        seed: int = 0,
        max_batches: int | None = 8,
        progress: bool = True,
        processes: Processes = ALONE,
    ) -> Self:
        """Return what is measured on; nothing is computed yet.

        Args:
            model: The model, neither wrapped, compiled nor quantized.
            batches: Mappings as a Hugging Face collator gives them, pairs of inputs and labels, or inputs alone; with
                ``loss_fn`` whatever that takes. They are drawn once, and kept: all stages see the same ones.
            loss_fn: Loss of a model on a batch as it came, a scalar; by default ``model(**batch).loss``, or the
                cross-entropy of what returns logits alone. Without labels it is how far the outputs are from those
                of the dense model.
            precision: Arithmetic of the forward pass and its derivatives.
            seed: Seed of random signs and probes.
            max_batches: Use at most this many batches; None for all.
            progress: Whether to show progress bars.
            processes: The processes that measure together; ``batches`` are the share of this one.

        Returns:
            The evidence.

        Raises:
            BatchError: If a batch is neither a mapping with tensors nor a pair of them.
            ConfigError: If a setting is out of range.
            UnsupportedModelError: If ``model`` is no torch module.
        """
        if not isinstance(model, nn.Module):
            name = type(model).__name__
            inner = " (a pipeline's is pipeline.model)" if hasattr(model, "model") else ""
            raise UnsupportedModelError(f"expected a model, a torch.nn.Module, got a {name}{inner}")
        if isinstance(loss_fn, nn.Module):
            raise ConfigError(
                f"loss_fn is called with the model and a batch, got a {type(loss_fn).__name__}, which takes outputs "
                "and labels; write loss_fn=lambda model, batch: criterion(model(batch[0]), batch[1]) for pairs"
            )
        if isinstance(batches, Tensor):
            raise BatchError(
                f"expected several batches, got one tensor of shape {list(batches.shape)}; put it in a list"
            )
        if isinstance(batches, Mapping):
            raise BatchError(f"expected several batches, got one with {sorted(map(str, batches))}; put it in a list")
        if not isinstance(batches, Iterable):
            raise BatchError(f"expected several batches, got a {type(batches).__name__}; pass a list or a DataLoader")
        if max_batches is not None:
            at_least("max_batches", max_batches, 1)
        at_least("seed", seed, 0)
        drawn = [
            as_batch(model, batch, index) if loss_fn is None else as_given(batch, index)
            for index, batch in enumerate(islice(batches, max_batches))
        ]
        arithmetic = member(Precision, "precision", precision)
        given = loss_fn is not None
        return cls(model, drawn, loss_fn or model_loss, arithmetic, seed, progress, processes, given)

    def check_made_with(self, precision: Precision, seed: int) -> None:
        """Check that a config asks for what this was made with, which is what counts.

        Args:
            precision: The config's precision.
            seed: The config's seed.

        Raises:
            ConfigError: If one of them is another.
        """
        for name, own, asked in (("precision", self.precision, precision), ("seed", self.seed, seed)):
            if own != asked:
                raise ConfigError(
                    f"the evidence was made with {name}={own}, and the config says {asked}; make it by "
                    "config.evidence(model, batches)"
                )

    @cached_property
    def example(self) -> Batch:
        """What the model is called with for the first batch of the first process.

        Raises:
            BatchError: If there is none.
        """
        # The same in all processes, so that all of them find the same groups.
        found = self.processes.first("example", next(self.inputs(), None))
        if found is None:
            raise BatchError(
                "expected at least one batch, got none: the model is run on it to see what can be removed; pass a list "
                "of batches, or a loader that has not run out"
            )
        return found

    def others(self) -> Iterator[Batch]:
        """Yield further batches of the first process, two samples of each form: other shapes, or other arguments.

        Yields:
            What the model is called with.
        """
        forms: dict[tuple[Any, ...], Batch] = {}
        for batch in self.inputs():
            form = tuple((k, tuple(v.shape[1:]) if isinstance(v, Tensor) else _plain(v)) for k, v in batch.items())
            forms.setdefault(form, few_samples(batch))
        yield from self.processes.first("examples", list(forms.values())[1:]) or []

    @contextmanager
    def ready(
        self,
        tensors: Mapping[str, Tensor],
        title: str,
        unit: str,
        ticks: int = 1,
        *,
        twice: bool = False,
        checkpointed: bool = False,
    ) -> Generator[Callable[[], object], None, None]:
        """Prepare the model for derivatives and show a progress bar inside the block.

        Args:
            tensors: What to differentiate with respect to, by name.
            title: What the bar is called.
            unit: What it counts.
            ticks: How many of them there are in a batch.
            twice: Whether the model is differentiated twice; see :func:`~hap_hf.model.state.preserved`. Criteria that
                differentiate only the loss twice, by the model's outputs, leave attention as it is.
            checkpointed: Whether activations stay checkpointed where they are.

        Yields:
            The function that moves the bar by one.
        """
        with (
            preserved(self.model, tensors, plain_attention=twice, without_checkpointing=not checkpointed),
            # The caller's autocast must not reach into the derivatives.
            torch.autocast(next(self.model.parameters()).device.type, enabled=False),
            part(title, unit, len(self.batches) * ticks, shown=self.progress) as tick,
        ):
            yield tick

    def loss_scale(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the loss scale to begin with.

        Args:
            tensors: What is differentiated with respect to, by name.

        Returns:
            1 unless anything is in float16.
        """
        half = self.precision is Precision.FP16 or any(t.dtype == torch.float16 for t in tensors.values())
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
        return rademacher(like, self.seed, self.processes.number(batch), probe)

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
        return batch_losses(
            self.model, self.batches, self.loss_fn, self.precision, terms=self.facts.terms, seed=self.seed
        )

    def inputs(self) -> Iterator[Batch]:
        """Yield for each batch what the model is called with.

        Yields:
            Keyword arguments of its forward.
        """
        for index, batch in enumerate(self.batches):
            yield self._inputs_of(batch, index)

    def _inputs_of(self, batch: Any, index: int) -> Batch:
        if not self.given_loss:
            return {name: value for name, value in batch.items() if name != OWN_OUTPUTS}
        # A loss may read what the model does not, and call the model as no batch would tell.
        ((loss, _),) = replace(self, batches=[batch]).losses()
        with preserved(self.model, dict(self.model.named_parameters())), torch.enable_grad():
            found = called_with(self.model, loss)
        return as_batch(self.model, batch, index) if found is None else found

    def samples(self) -> Iterator[SampleBatch]:
        """Yield the batches so that their samples can also be computed alone, as far as they have losses of their own.

        Yields:
            The batches; with one sample each where the loss of a batch is not made up of those of its samples.
        """
        # One by one, so that whoever remembers which batch is at hand sees this one while it is measured.
        for batch in self.batches:
            ((loss, num_terms),) = replace(self, batches=[batch]).losses()
            listed = num_samples(batch)
            size = listed if self.facts.adds_up else 1
            yield SampleBatch(loss, num_terms, size, partial(self._single, batch), listed)

    def _single(self, batch: Any, n: int) -> SampleBatch:
        """Return the batch of sample n alone."""
        one = self.facts.part_of(batch, slice(n, n + 1)) if self.facts.adds_up else batch
        return next(replace(self, batches=[one]).samples())


def _plain(value: object) -> object:
    """Return an argument that may choose another path through the model, or what kind of thing it is."""
    return value if isinstance(value, (bool, int, float, str)) else type(value)
