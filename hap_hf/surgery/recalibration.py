"""New batch norm statistics for a network whose activations have changed."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.errors import BatchError
from hap_hf.evidence.batches import as_batch, call, move_to_model
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.host import BatchNorm
from hap_hf.layers.projection import on_input
from hap_hf.model.change import TensorChange
from hap_hf.model.stale import note_replaced
from hap_hf.model.state import preserved
from hap_hf.model.values import replace_values_

logger = logging.getLogger(__name__)


def recalibrate_batch_norms_(model: nn.Module, batches: Iterable[Any], *, processes: Processes = ALONE) -> int:
    r"""Estimate the running mean and variance of every batch norm anew, from ``batches`` alone.

    Cut and implanted channels shift the activations of everything after them, while the statistics still describe the
    network from before. Each batch is passed through once, every batch norm normalising by that batch's own mean and
    (biased) variance, as in training; of a batch norm's means m_b and unbiased variances s_b, over n_b values a channel
    in batch b,

        ``running_mean = sum_b n_b m_b / sum_b n_b`` and ``running_var = sum_b n_b s_b / sum_b n_b``.

    For batches of one size that is what torch accumulates with ``momentum=None``. Everything else is in eval mode,
    dropout and stochastic depth included.

    The batch's statistics reach a batch norm through its buffers, and no batch norm enters train mode. So subclasses
    that drop or activate after normalising work as they do in eval mode, and so does ``nn.SyncBatchNorm``, also on the
    CPU. Batch norms that do not track statistics, frozen ones that are no torch batch norm, and those that no batch
    reaches, are left alone.

    Reference: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, who call it PreciseBN.

    Args:
        model: The model. Apart from the statistics it is left as found, ``num_batches_tracked`` included; after an
            exception, the statistics are the old ones too.
        batches: Inputs for the model, or pairs of inputs and labels; labels are not needed. A
            batch norm behind global pooling takes two samples or more in each. None is drawn if there is no batch norm
            to recalibrate.
        processes: The processes whose batches count; ``batches`` are the share of this one. By default nothing is
            exchanged with other processes.

    Returns:
        Number of batch norms that have new statistics.

    Raises:
        BatchError: If there are no batches, a batch has only one value for each channel of some batch norm, or
            statistics come out that are not finite.
    """
    reached = _measured(model, batches, processes, normalise=True)
    for norm in reached:
        norm.write(*norm.averages())
    return len(reached)


def renew_statistics_(
    model: nn.Module, batches: Iterable[Any], *, processes: Processes = ALONE
) -> tuple[TensorChange, ...]:
    """Estimate the statistics of batch norms anew, and let each compute what it computed before.

    Where the layers before a batch norm were fitted to it as it is, new statistics alone would undo the fit. Old ones
    would: as soon as the model is trained, batch norms normalise by what is there now. So the weight is scaled by the
    ratio of the deviations and the bias takes up the difference of the means.

    Args:
        model: The model.
        batches: Inputs for the model; labels are not needed.
        processes: The processes whose batches count; ``batches`` are the share of this one.

    Returns:
        The weights and biases that were replaced. Batch norms without them are left as they are.

    Raises:
        BatchError: As for :func:`recalibrate_batch_norms_`; the model is then as it was.
    """
    values: dict[str, Tensor] = {}
    reached = [n for n in _measured(model, batches, processes, normalise=False) if n.module.affine]
    for norm in reached:
        mean, var = norm.averages()
        old_mean, old_var = norm.running_mean.double(), norm.running_var.double()
        weight, bias = (getattr(norm.module, name).detach() for name in ("weight", "bias"))
        slope = weight.double() / (old_var + norm.module.eps).sqrt()  # of the output, as a function of the input
        values[f"{norm.name}.weight"] = (slope * (var.double() + norm.module.eps).sqrt()).to(weight.dtype)
        values[f"{norm.name}.bias"] = (bias.double() + slope * (mean.double() - old_mean)).to(bias.dtype)
        norm.write(mean, var)
    changes = replace_values_(model, values)
    note_replaced(changes)
    return changes


Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance of what goes into each batch norm, by its name."""


def statistics_of(model: nn.Module, batches: Iterable[Any], *, processes: Processes = ALONE) -> Statistics:
    """Return the statistics of what goes into the batch norms of a model, each normalising by its own batch.

    Args:
        model: The model, which is left as found.
        batches: Inputs for the model; labels are not needed.
        processes: The processes whose batches count; ``batches`` are the share of this one.

    Returns:
        The statistics.

    Raises:
        BatchError: As for :func:`recalibrate_batch_norms_`.
    """
    return {norm.name: norm.averages() for norm in _measured(model, batches, processes, normalise=True)}


def shift_statistics_(
    model: nn.Module, batches: Iterable[Any], before: Statistics, *, processes: Processes = ALONE
) -> None:
    """Let the statistics of batch norms follow a small change of the layers before them.

    Means move by the difference and variances by the ratio of what the same batches give before and after the change.
    So a few samples are enough, which would be too few to estimate the statistics themselves from: without a change
    nothing moves.

    Reference: Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019, who
    correct biases for the shift of the mean.

    Args:
        model: The model after the change.
        batches: The same inputs.
        before: What :func:`statistics_of` returned before the change.
        processes: As for :func:`statistics_of`.

    Raises:
        BatchError: As for :func:`recalibrate_batch_norms_`; the model is then as it was.
    """
    for norm in _measured(model, batches, processes, normalise=True):
        (mean, var), (old_mean, old_var) = norm.averages(), before[norm.name]
        ratio = torch.where(old_var > 0, var / old_var, 1.0)
        norm.write(norm.running_mean + mean - old_mean, norm.running_var * ratio)


def _measured(
    model: nn.Module, batches: Iterable[Any], processes: Processes, *, normalise: bool
) -> "list[_Statistics]":
    """Return the statistics of all batch norms that the batches reach.

    Args:
        model: The model, which is left as found.
        batches: Inputs.
        processes: The processes whose batches count.
        normalise: Whether each batch norm normalises by the batch's statistics meanwhile, as in training.

    Returns:
        What was measured, all of it finite.

    Raises:
        BatchError: As for :func:`recalibrate_batch_norms_`.
    """
    norms = [
        _Statistics(name, module, module.running_mean, module.running_var, normalise)
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
        if module.running_mean is not None and module.running_var is not None
    ]
    if not norms:
        return []
    num_batches = 0
    # The hook runs before the norm itself: what it writes into the buffers is what this very call normalises by.
    handles = [on_input(norm.module, norm.add) for norm in norms]
    try:
        # Code that was compiled before the hooks were there would not call them.
        with preserved(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for index, batch in enumerate(batches):
                call(model, move_to_model(model, as_batch(model, batch, index)))
                num_batches += 1
    finally:
        for handle in handles:
            handle.remove()
    sums = {"batches": torch.tensor(num_batches, device="cpu")}
    for norm in norms:
        sums |= {f"{norm.name} {name}": total for name, total in norm.sums.items()}
    sums = processes.summed("batch norm statistics", sums)
    for norm in norms:
        norm.sums = {name: sums[f"{norm.name} {name}"] for name in norm.sums}
    if not sums["batches"]:
        raise BatchError(
            f"new statistics for {len(norms)} batch norms take at least one batch, got none; "
            "pass a list of batches, or a loader that has not run out"
        )
    reached = [norm for norm in norms if norm.sums["values"]]
    for norm in reached:
        norm.averages()  # raises before anything is written
    return reached


class _Statistics:
    """The statistics of one batch norm, and their sums over batches.

    Args:
        name: Name of the batch norm.
        module: The batch norm.
        running_mean: Its buffer, ``[num_features]``.
        running_var: Its buffer, ``[num_features]``.
        normalise: Whether a call normalises by its own input.
    """

    def __init__(
        self, name: str, module: BatchNorm, running_mean: Tensor, running_var: Tensor, normalise: bool
    ) -> None:
        self.name = name
        self.module = module
        self.running_mean = running_mean
        self.running_var = running_var
        self._normalise = normalise
        self.sums = {
            "values": torch.zeros((), dtype=torch.long, device="cpu"),
            "mean": torch.zeros_like(running_mean, dtype=torch.float64),
            "var": torch.zeros_like(running_var, dtype=torch.float64),
        }

    def add(self, x: Tensor) -> None:
        """Count in the input of one call.

        Args:
            x: Input of the batch norm, ``[N, num_features, ...]``.

        Raises:
            BatchError: If there is only one value for each channel.
        """
        num_values = x.numel() // x.shape[1]
        if num_values < 2:
            raise BatchError(
                f"the variance of batch norm {self.name!r} takes at least 2 values for each channel, got an input of "
                f"shape {list(x.shape)}; use batches of 2 samples or more, and leave out a smaller last one "
                "(drop_last=True)"
            )
        x = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        if self._normalise:
            self.write(mean, var)
        # Normalising takes the biased variance, as in training; running variances are unbiased ones.
        mean, var = mean.to(self.sums["mean"]), var.to(self.sums["var"])
        self.sums["values"] += num_values
        self.sums["mean"] += num_values * mean
        self.sums["var"] += num_values * (num_values / (num_values - 1)) * var  # unbiased

    def averages(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance over all values so far, in the dtype of the buffers.

        Returns:
            Mean and unbiased variance, ``[num_features]`` each.

        Raises:
            BatchError: If one of them is not finite.
        """
        mean, var = (
            (self.sums[name] / self.sums["values"].item()).to(buffer.dtype)
            for name, buffer in {"mean": self.running_mean, "var": self.running_var}.items()
        )
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise BatchError(
                f"the statistics of batch norm {self.name!r} must be finite, and in {var.dtype} they are not; look for "
                "NaN or infinity in the batches and in the weights, or recalibrate in float32"
            )
        return mean, var

    def write(self, mean: Tensor, var: Tensor) -> None:
        """Let the batch norm normalise by ``mean`` and ``var``.

        Args:
            mean: Mean, ``[num_features]``.
            var: Variance, ``[num_features]``.
        """
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
