"""A model as torch.export takes it: tensors in, logits out, with names for the dimensions that may change."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import as_batch, batch_size


class Logits(nn.Module):
    """A model that takes its inputs by position and returns nothing but its logits.

    Args:
        model: The model.
        names: Names of its inputs, in order.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        # A cache would be an output of another shape at each call. Whether a model has one says the class of its
        # config: the Trainer writes the setting into the config of every model.
        known = inspect.signature(type(getattr(model, "config", None))).parameters if hasattr(model, "config") else {}
        self.settings = {"use_cache": False} if "use_cache" in known else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits.

        Args:
            *inputs: The model's inputs.

        Returns:
            Its logits; of a model without any, its first tensor.
        """
        out: Any = self.model(**dict(zip(self.names, inputs, strict=True)), **self.settings)
        if isinstance(out, Tensor):
            return out
        found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        first: Tensor = (
            found if found is not None else (next(iter(out.values())) if isinstance(out, Mapping) else out[0])
        )
        return first


def inputs_of(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the inputs to export with: those of a batch without its labels.

    Args:
        model: The model.
        batch: Keyword arguments of its forward, or inputs and labels; of an encoder with a decoder, the labels make the
            decoder's inputs where it has none.

    Returns:
        The inputs by name, in the order of the model's forward, of at least two samples.

    Raises:
        BatchError: If the batch holds anything but tensors of as many samples, or the model does not take it.
    """
    given = dict(as_batch(model, batch))
    labels = given.pop("labels", None)
    config: Any = getattr(model, "config", None)
    shifted: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    lacks_decoder = not {"decoder_input_ids", "decoder_inputs_embeds"} & given.keys()
    if getattr(config, "is_encoder_decoder", False) and lacks_decoder and labels is not None and shifted is not None:
        given["decoder_input_ids"] = shifted(labels=labels)
    parameters = list(inspect.signature(model.forward).parameters)
    ordered = sorted(given, key=lambda name: parameters.index(name) if name in parameters else len(parameters))
    size = batch_size(given)
    for name in ordered:
        value = given[name]
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != size:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(f"{name}: expected a tensor of {size} samples to export with, got {got}")
    # What is 1 in the example would be taken for a constant.
    wanted = max(2, size)
    device = next(model.parameters()).device
    return {name: torch.cat([given[name]] * (1 if size > 1 else 2))[:wanted].to(device) for name in ordered}


def dynamic_dims(inputs: Mapping[str, Tensor], *, named: bool) -> tuple[dict[int, Any], ...]:
    """Return which dimensions of inputs may change: the batch of all, and the lengths of texts.

    Args:
        inputs: Inputs by name. Two-dimensional integers are texts; those of one length share it.
        named: Whether the dimensions have names; where not, torch finds how far they may go.

    Returns:
        For each input the dimensions by number.
    """
    batch, lengths = torch.export.Dim("batch"), dict[int, Any]()
    result = []
    for value in inputs.values():
        dims: dict[int, Any] = {0: batch}
        if value.dim() == 2 and not value.is_floating_point():
            name = "sequence" if not lengths else f"sequence_{len(lengths)}"
            dims[1] = lengths.setdefault(value.shape[1], torch.export.Dim(name))
        result.append(dims if named else dict.fromkeys(dims, torch.export.Dim.AUTO))
    return tuple(result)


def fewer(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs of another shape, to compare with: one sample, and texts that are shorter by one."""
    return {
        name: value[:1, :-1] if value.dim() == 2 and not value.is_floating_point() and value.shape[1] > 2 else value[:1]
        for name, value in inputs.items()
    }
