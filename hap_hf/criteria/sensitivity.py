"""HAP's formula."""

from torch import Tensor


def unit_sensitivity(trace: Tensor, squared_norm: Tensor, num_entries: int) -> Tensor:
    r"""Return HAP's sensitivity of each unit, tr(H_uu) ||w_u||^2 / (2 n_u).

    The second-order loss increase w_u^T H_uu w_u / 2 of removing unit u, with H_uu replaced by its mean eigenvalue.
    Assumes a gradient near zero, drops the cross terms to other units, and is negative where the trace is. Linear in
    the trace, so that a standard error of the trace becomes one of the sensitivity.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022. The reference code leaves out
    the 1/2.

    Args:
        trace: Hessian trace over each unit's entries, ``[num_units]``, in loss per squared weight.
        squared_norm: Squared Euclidean norm of each unit's weights, ``[num_units]``.
        num_entries: Number of weight entries a unit has.

    Returns:
        Sensitivity of each unit, ``[num_units]``, in units of the loss.

    Example:
        >>> import torch
        >>> unit_sensitivity(torch.tensor([4.0, -1.0]), torch.tensor([3.0, 6.0]), num_entries=6)
        tensor([ 1.0000, -0.5000])
    """
    return trace * squared_norm / (2 * num_entries)
