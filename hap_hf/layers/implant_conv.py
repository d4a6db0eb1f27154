"""The implant of convolutions: 1 x 1 in place of k x k for the moderately sensitive output channels."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from hap_hf.errors import UnsupportedModelError
from hap_hf.layers.implant_linear import side_by_side

# Copies of activations that patch_moment holds at a time, in bytes.
_WORKSPACE = 64 * 2**20


class ImplantConv2d(nn.Module):
    r"""A convolution whose implanted output channels read only the centre of each patch.

    ``y[kept] = W * x + b``, a ``kh x kw`` convolution, and ``y[implanted] = P * x + b``, a 1 x 1 convolution at the
    same output positions. Within each segment of the output the kept channels come first and the implanted ones after,
    so the forward pass concatenates and never indexes. Kept weights keep their names ``weight`` and ``bias``: a loader
    that does not know hap_hf then meets wrong shapes and fails, instead of filling the gaps at random.

    Along each dimension output position p reads input position ``p * stride - padding + dilation * (k // 2)``, where
    the kernel's centre tap lies; of an even kernel's two middle taps that is the later one. If the padding is
    ``dilation * (k // 2)`` on either side and k is odd, this is the plain strided 1 x 1 convolution. Otherwise the
    input is first cropped, or padded as ``padding_mode`` says, by the difference, which gives both parts the same
    number of positions for every input.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, and its code, repository
    yaozhewei/HAP, where outputs are scattered back to their channels and the 1 x 1 convolution has no alignment.

    Args:
        in_channels: Number of input channels.
        segments: Number of kept and of implanted channels in each segment of the output, in order; one segment for
            an ordinary layer.
        kernel_size: Height and width of the kept channels' kernel.
        stride: Stride along height and width.
        padding: Padding along height and width, or ``"same"`` or ``"valid"``.
        dilation: Dilation along height and width.
        groups: 1; a grouped convolution cannot take an implant.
        padding_mode: As of ``nn.Conv2d``.
        bias: Whether the layer has a bias, ``[out_channels]``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UnsupportedModelError: If ``groups`` is not 1.
    """

    def __init__(
        self,
        in_channels: int,
        segments: Sequence[tuple[int, int]],
        kernel_size: tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: str | tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise UnsupportedModelError(
                f"an implant replaces channels of a convolution with groups=1, got groups={groups}; "
                "keep or remove the channels of a grouped convolution instead"
            )
        self.in_channels = in_channels
        self.segments = tuple((int(kept), int(implanted)) for kept, implanted in segments)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.padding_mode = padding_mode
        kept, implanted = (sum(sizes) for sizes in zip(*self.segments, strict=True))
        self.out_channels = kept + implanted

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = new(kept, in_channels, *kernel_size)
        self.implant_pointwise = new(implanted, in_channels, 1, 1)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", new(self.out_channels) if bias else None)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, in_channels: int, segments: Sequence[tuple[int, int]]) -> Self:
        """Return an implanted layer with the geometry, device, dtype and mode of ``conv``, its weights not yet set.

        Args:
            conv: The convolution to replace.
            in_channels: Number of input channels that are left.
            segments: Number of kept and of implanted channels in each segment of the output.

        Returns:
            The layer; its values are uninitialised memory.
        """
        new = cls(
            in_channels,
            segments,
            _pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            x: Input, ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.

        Returns:
            Output, ``[N, out_channels, H', W']`` or ``[out_channels, H', W']``.
        """
        return self.product(x, self.weight, self.implant_pointwise)

    def product(self, x: Tensor, weight: Tensor, pointwise: Tensor) -> Tensor:
        """Return the layer's output with some weights in the place of its own.

        Args:
            x: Input, ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.
            weight: In the place of ``weight``.
            pointwise: In the place of ``implant_pointwise``.

        Returns:
            Output, ``[N, out_channels, H', W']`` or ``[out_channels, H', W']``.
        """
        # torch refuses convolutions without output channels, so an empty part is not computed.
        kept, implanted = (sum(sizes) for sizes in zip(*self.segments, strict=True))
        if not kept:
            out = self._implanted(x, pointwise)
        elif not implanted:
            out = self._kept(x, weight)
        else:
            out = side_by_side(self._kept(x, weight), self._implanted(x, pointwise), self.segments, -3)
        # Under autocast a bias of its own dtype would raise the output to that dtype.
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)

    def _kept(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return functional.conv2d(x, weight, None, self.stride, self.padding, self.dilation)
        x = functional.pad(x, padding_sides(self), mode=self.padding_mode)
        return functional.conv2d(x, weight, None, self.stride, 0, self.dilation)

    def _implanted(self, x: Tensor, pointwise: Tensor) -> Tensor:
        """Return the implanted channels, at the same positions as the kept ones."""
        # How far the centres read beyond the input, or stay within it, on each side.
        sides = [p - reach for p, reach in zip(padding_sides(self), _reach(self), strict=True)]
        if any(side > 0 for side in sides):
            # What is padded nearest to the input does not depend, in any mode, on how much is padded.
            x = functional.pad(x, [max(side, 0) for side in sides], mode=_pad_mode(self))
        if any(side < 0 for side in sides):
            x = functional.pad(x, [min(side, 0) for side in sides])
        return functional.conv2d(x, pointwise, None, self.stride)

    def sync_sizes(self, segments: Sequence[tuple[int, int]]) -> None:
        """Take over new segment sizes after the parameters were cut.

        Args:
            segments: Number of kept and of implanted channels in each segment of the output.
        """
        self.segments = tuple(segments)
        self.in_channels = self.implant_pointwise.shape[1]
        self.out_channels = sum(map(sum, self.segments))

    def extra_repr(self) -> str:
        """Return the sizes, for printing the model."""
        text = (
            f"in_channels={self.in_channels}, segments={list(self.segments)}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding!r}"
        )
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        return text + (f", padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else "")


def pointwise_rows(rows: Tensor, moment: Tensor | None = None) -> Tensor:
    r"""Return the 1 x 1 weights that stand in for ``rows`` at first.

    There are three ways to begin:

    * least squares, with a moment: for patches q and their centres c the minimiser P of ``E ||R q - P c||^2``, where R
      are the flattened rows, is ``P = R M_qc M_cc^+`` with ``M_qc = E[q c^T]`` and ``M_cc = E[c c^T]``. Directions
      of c with less than 1e-7 of the largest one's energy, which sums in float32 do not resolve, count as absent,
      so that dead or dependent input channels do no harm;
    * centre tap, without a moment: what the rows themselves do to the centre, optimal for white inputs;
    * zero, as in the paper's code: not made here, where P would still be one of the two, but by zeroing what the
      layers that read the implanted channels do with them.

    Reference: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, code in repository
    yaozhewei/HAP.

    Args:
        rows: The weights to replace, ``[implanted, in_channels, kh, kw]``.
        moment: Mean or sum of patch times centre over positions, ``[in_channels * kh * kw, in_channels]``, see
            :func:`patch_moment`. Its scale does not matter.

    Returns:
        The weights, ``[implanted, in_channels, 1, 1]``, in the dtype of ``rows``.
    """
    rows, centre = rows.detach().flatten(2), centre_tap(rows.shape[2:])
    if moment is None:
        return rows[:, :, centre, None, None].clone()
    work = rows.double().flatten(1)
    patch_centre = moment.double().to(work.device)
    channels, num_taps = rows.shape[1:]
    # M_cc is in M_qc: the centre is itself one of the taps.
    values, vectors = torch.linalg.eigh(patch_centre.reshape(channels, num_taps, channels)[:, centre])
    floor = values.amax().clamp_min(1e-30) * 1e-7
    inverse = torch.where(values > floor, values.reciprocal(), 0.0)
    pointwise: Tensor = (work @ patch_centre @ vectors * inverse) @ vectors.T
    return pointwise[:, :, None, None].to(rows.dtype)


def patch_moment(x: Tensor, module: "nn.Conv2d | ImplantConv2d") -> tuple[Tensor, int]:
    """Return the sum of patch times centre input over the samples and output positions of one call.

    Sums over a sample's positions are in the dtype of ``x``, at least float32, and sums over samples in float64.
    Patches are never laid out: each tap is a strided view of the input, and samples are taken a few at a time.

    Args:
        x: Input of the convolution, ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.
        module: The convolution, with one group.

    Returns:
        The sum, ``[in_channels * kh * kw, in_channels]``, float64, rows in the order of ``torch.nn.functional.unfold``
        (channel, then tap); and the number of positions it was taken over, all samples together.
    """
    x = x.detach() if x.dim() == 4 else x.detach()[None]
    x = x if x.dtype == torch.float64 else x.float()
    channels, sides, mode = x.shape[1], padding_sides(module), _pad_mode(module)
    (kh, kw), (dh, dw), (sh, sw) = _pair(module.kernel_size), _pair(module.dilation), _pair(module.stride)
    moment = torch.zeros(channels, kh * kw, channels, dtype=torch.float64, device=x.device)
    num_positions = 0
    # Each sample is held three times: padded, at the centres, and at one tap; and its products with the latter.
    sample_bytes = x.element_size() * channels * (3 * x.shape[2] * x.shape[3] + channels)
    for samples in torch.split(x, max(1, _WORKSPACE // sample_bytes)):
        padded = functional.pad(samples, sides, mode=mode)
        height, width = padded.shape[2] - dh * (kh - 1), padded.shape[3] - dw * (kw - 1)
        taps = [
            padded[:, :, dh * i : dh * i + height : sh, dw * j : dw * j + width : sw]
            for i in range(kh)
            for j in range(kw)
        ]
        centres = taps[centre_tap(module.kernel_size)].flatten(2)
        num_positions += centres.shape[0] * centres.shape[2]
        for number, tap in enumerate(taps):
            moment[:, number] += (tap.flatten(2) @ centres.mT).sum(0, dtype=torch.float64)
    return moment.flatten(0, 1), num_positions


def centre_tap(kernel_size: Sequence[int]) -> int:
    """Return the number of the centre tap, counted along the rows of the kernel."""
    height, width = kernel_size
    return height // 2 * width + width // 2


def padding_sides(module: "nn.Conv2d | ImplantConv2d") -> list[int]:
    """Return the padding as ``functional.pad`` takes it: left, right, top, bottom."""
    if not isinstance(module.padding, str):
        height, width = module.padding
        return [width, width, height, height]
    if module.padding == "valid":
        return [0, 0, 0, 0]
    (kh, kw), (dh, dw) = module.kernel_size, module.dilation
    # "same": of an odd total torch puts the larger part after.
    return [side for total in (dw * (kw - 1), dh * (kh - 1)) for side in (total // 2, total - total // 2)]


def _reach(module: "nn.Conv2d | ImplantConv2d") -> list[int]:
    """Return how far the kernel reaches from its centre tap: left, right, up, down."""
    (kh, kw), (dh, dw) = module.kernel_size, module.dilation
    return [dw * (kw // 2), dw * ((kw - 1) // 2), dh * (kh // 2), dh * ((kh - 1) // 2)]


def _pad_mode(module: "nn.Conv2d | ImplantConv2d") -> str:
    return "constant" if module.padding_mode == "zeros" else module.padding_mode


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width
