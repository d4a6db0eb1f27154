"""What distillation adds to a loss, and how much of it a batch contributes to a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hap_hf.errors import UnsupportedModelError
from hap_hf.evidence.losses import IGNORED_LABEL
from hap_hf.trainer.divergence import (
    attention_divergence,
    hidden_divergence,
    layerwise,
    logits_divergence,
    named_outputs,
)
from hap_hf.trainer.scoring import is_scoring


@dataclass(frozen=True)
class Weights:
    """How much each term counts.

    Args:
        alpha: Share of the logits' term.
        temperature: By which logits are divided.
        hidden: Weight of the hidden states.
        attention: Weight of the attention maps.
    """

    alpha: float
    temperature: float
    hidden: float
    attention: float

    def terms(
        self, student: Any, teacher: Any, inputs: Mapping[str, Any], problem: str | None, shifted: bool
    ) -> Tensor:
        """Return the weighted sum of all terms, each a mean over the batch.

        Args:
            student: What the model returned.
            teacher: What its teacher returned.
            inputs: The batch, with labels.
            problem: The ``problem_type`` of transformers.
            shifted: Whether position t answers the label of position t + 1.

        Returns:
            The sum, a scalar.
        """
        masks = {"encoder": inputs.get("attention_mask"), "own": _own_mask(inputs, student)}
        terms = []
        if self.alpha:
            terms.append(self.alpha * self._logits(student, teacher, inputs.get("labels"), problem, shifted))
        if self.hidden:
            states = layerwise("hidden_states", student, teacher, masks, hidden_divergence, "set hidden=0")
            terms.append(self.hidden * states)
        if self.attention:
            advice = "load it with attn_implementation='eager', or set attention=0"
            maps = layerwise("attentions", student, teacher, masks, attention_divergence, advice)
            terms.append(self.attention * maps)
        return torch.stack(terms).sum()

    def _logits(self, student: Any, teacher: Any, labels: Tensor | None, problem: str | None, shifted: bool) -> Tensor:
        """Return the mean over all outputs that are logits: several where a model answers several questions.

        Raises:
            UnsupportedModelError: If there are none, or the teacher's have another shape.
        """
        own, wanted = named_outputs(student, "logits"), named_outputs(teacher, "logits")
        names = [name for name in own if isinstance(own[name], Tensor) and isinstance(wanted.get(name), Tensor)]
        for name in names:
            if own[name].shape != wanted[name].shape:
                raise UnsupportedModelError(
                    f"expected {name} of the teacher in the model's shape {list(own[name].shape)}, got "
                    f"{list(wanted[name].shape)}; pass a teacher with the same classes that gets the same inputs"
                )
        if not names:
            raise UnsupportedModelError(
                f"expected logits in what the model returns, got {type(student).__name__} without; set alpha=0 and "
                "hidden above it, or return a mapping with 'logits' (use_liger_kernel leaves them out)"
            )
        each = [
            logits_divergence(
                own[name],
                wanted[name],
                temperature=self.temperature,
                problem=problem,
                labels=labels,
                shifted=shifted,
            )
            for name in names
        ]
        return torch.stack(each).mean()


def _own_mask(inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:
    """Return which positions of the text that is answered count: all but padding."""
    if not named_outputs(outputs, "encoder_last_hidden_state"):
        return inputs.get("attention_mask")
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    return labels != IGNORED_LABEL if mask is None and isinstance(labels, Tensor) else mask


def share_of_step(
    trainer: Trainer, inputs: Mapping[str, Any], num_items: Tensor | int | None, shifted: bool
) -> Tensor | float:
    """Return by what a mean over this batch is multiplied, so that it counts as the task's loss does.

    The Trainer divides means by the number of batches that are accumulated. A loss that was told the number of items
    in all of them is a part of their mean already, and so must be what is added to it.

    Args:
        trainer: The Trainer.
        inputs: The batch, with labels.
        num_items: Number of items in all batches of the step, where the Trainer counts them.
        shifted: Whether the first label of each row does not count.

    Returns:
        The factor.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    own = trainer.compute_loss_func is not None
    if scaled is None:
        scaled = own or (trainer.model_accepts_loss_kwargs and num_items is not None)
    if not scaled:
        return 1.0
    labels = inputs.get("labels")
    if num_items is None or not isinstance(labels, Tensor):
        return 1.0 if is_scoring() else 1 / trainer.current_gradient_accumulation_steps
    labels = labels[..., 1:] if shifted else labels
    # Averaged over processes, each of which has a part of the items.
    parts = trainer.args.world_size if trainer.args.average_tokens_across_devices else 1
    return parts * (labels != IGNORED_LABEL).sum() / num_items
