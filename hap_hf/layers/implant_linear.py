"""Implants: cheaper stand-ins for the moderately sensitive output rows of a layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImplantLinear(nn.Module):
    r"""A linear layer whose implanted output features come through a bottleneck.

    ``y[kept] = W x + b`` and ``y[implanted] = U (V x) + b``, with ``V`` ``[rank, in_features]`` and ``U``
    ``[implanted, rank]``. Within each segment of the output the kept features come first and the implanted ones after,
    so the forward pass concatenates and never indexes. Kept weights keep their names ``weight`` and ``bias``: a loader
    that does not know hap_hf then meets wrong shapes and fails, instead of filling the gaps at random.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, describes the transformer
    implant only as a low-rank one, smaller and less expensive than what it replaces, and its released code has none.
    Factoring the producing rows, and leaving the rest of the block as it is, is this project's reading.

    Args:
        in_features: Size of the input's last dimension.
        segments: Number of kept and of implanted features in each segment of the output, in order. One segment for
            an ordinary layer, three for a fused query, key and value projection.
        rank: Size of the bottleneck.
        bias: Whether the layer has a bias, ``[out_features]``.
        transposed: Whether ``weight`` is stored as ``[in, out]``, as in GPT-2's ``Conv1D``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        segments: Sequence[tuple[int, int]],
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.segments = tuple((int(kept), int(implanted)) for kept, implanted in segments)
        self.rank = rank
        self.transposed = transposed
        kept, implanted = (sum(sizes) for sizes in zip(*self.segments, strict=True))
        self.out_features = kept + implanted

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = new(in_features, kept) if transposed else new(kept, in_features)
        self.implant_down = new(rank, in_features)
        self.implant_up = new(implanted, rank)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", new(self.out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            x: Input, ``[..., in_features]``.

        Returns:
            Output, ``[..., out_features]``.
        """
        return self.product(x, self.weight, self.implant_down, self.implant_up)

    def product(
        self, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, inner: Callable[[Tensor], Tensor] = lambda h: h
    ) -> Tensor:
        """Return the layer's output with some weights in the place of its own.

        Args:
            x: Input, ``[..., in_features]``.
            weight: In the place of ``weight``, and stored like it.
            down: In the place of ``implant_down``.
            up: In the place of ``implant_up``.
            inner: Applied to what lies in the bottleneck, ``[..., rank]``.

        Returns:
            Output, ``[..., out_features]``.
        """
        kept = functional.linear(x, weight.T if self.transposed else weight)  # [..., kept]
        implanted = functional.linear(inner(functional.linear(x, down)), up)  # [..., implanted]
        # Surgery put the units into this order in whatever follows or reads them, so that parts side by side will do.
        # Outputs in their old order would take an index: a gather in each forward pass, a scatter in each backward one.
        out = side_by_side(kept, implanted, self.segments, -1)
        # Under autocast a bias of its own dtype would raise the output to that dtype.
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def sync_sizes(self, segments: Sequence[tuple[int, int]]) -> None:
        """Take over new segment sizes after the parameters were cut.

        Args:
            segments: Number of kept and of implanted features in each segment of the output.
        """
        self.segments = tuple(segments)
        self.in_features = self.implant_down.shape[1]
        self.out_features = sum(map(sum, self.segments))

    def extra_repr(self) -> str:
        """Return the sizes, for printing the model."""
        return f"in_features={self.in_features}, segments={list(self.segments)}, rank={self.rank}"


def side_by_side(kept: Tensor, implanted: Tensor, segments: Sequence[tuple[int, int]], dim: int) -> Tensor:
    """Return the kept and the implanted features of each segment in turn.

    Args:
        kept: Kept features of all segments, in order.
        implanted: Implanted ones.
        segments: Number of kept and of implanted features in each segment.
        dim: Dimension along which the features lie.

    Returns:
        The features, side by side.
    """
    kept_parts = torch.split(kept, [k for k, _ in segments], dim=dim)
    implanted_parts = torch.split(implanted, [i for _, i in segments], dim=dim)
    # By number, as tracers such as torch.fx can iterate over no tensors that they only pretend to have.
    return torch.cat([part for n in range(len(segments)) for part in (kept_parts[n], implanted_parts[n])], dim=dim)


def factor_rows(rows: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Return ``U`` and ``V`` so that ``U V`` stands in for ``rows``.

    With the second moment ``M = E[x x^T] = L L^T`` of the inputs, ``E ||(W - U V) x||^2 = ||(W - U V) L||_F^2``, which
    the truncated singular value decomposition of ``W L`` minimises (Eckart and Young, 1936). Without a moment
    ``L = I``.

    Args:
        rows: The weights to replace, ``[implanted, in_features]``.
        rank: Size of the bottleneck.
        moment: Second moment of the inputs, ``[in_features, in_features]``.

    Returns:
        ``U``, ``[implanted, rank]``, and ``V``, ``[rank, in_features]``, in the dtype of ``rows``.
    """
    work = rows.detach().double()
    if moment is None:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        # Each factor takes the root of the singular values: of very unequal factors one would learn much faster.
        up, down = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
    else:
        # A symmetric root survives rank-deficient moments, where a Cholesky factor does not exist.
        values, vectors = torch.linalg.eigh(moment.double().to(work.device))
        floor = values.amax().clamp_min(1e-30) * 1e-8
        root = values.clamp_min(floor).sqrt()
        u, s, vh = torch.linalg.svd((work @ vectors) * root, full_matrices=False)
        balance = s[:rank].sqrt()
        up, down = u[:, :rank] * balance, balance[:, None] * ((vh[:rank] / root) @ vectors.T)
    return up.to(rows.dtype), down.to(rows.dtype)
