"""One layer, fitted so that the residual stream behind it is that of the dense model again."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hap_hf.curvature import accumulation_dtype
from hap_hf.curvature.sums import add_to_
from hap_hf.layers.projection import channel_dim, known, output_dim, spatial_dims
from hap_hf.reconstruction.blocks import Block, PathGains, UnitEnergies
from hap_hf.reconstruction.implanted import ImplantedRows
from hap_hf.reconstruction.low_rank import fit_low_rank
from hap_hf.reconstruction.ridge import Moments, fit_held_out
from hap_hf.reconstruction.stream import Way

_HELD_OUT = 4
"""Of so many samples one is held out, to choose the strength of the regularisation by."""

_MOST_POSITIONS = 64
"""Of an image at most so many positions are looked at."""

_MOST_DIRECTIONS = 64
"""Of a path at most so many directions are looked at."""

_LEAST_FACTOR = 1e-3
"""Outputs that reach the stream with less than this share of the largest factor are left as they are."""


@dataclass(frozen=True)
class Stop:
    """What a layer computed in one forward pass, and where its output ended up.

    Args:
        path: Name of the layer.
        x: Its input, without the units that go.
        y: Its output.
        way: What became of the output: the value of the stream, and how much of the output is in it.
    """

    path: str
    x: Tensor
    y: Tensor
    way: Way


@dataclass(frozen=True)
class Fitted:
    """What came of a layer.

    Args:
        values: New values by the full name of the parameter. Columns that read inputs that go are as they were.
        shift: What is added to the stream because a batch norm took up the constant, ``[outputs, 1, ...]``.
        ridge: Strength of the regularisation; infinite where the layer stays as it is.
        left: Share of what the stream lacked that is left, on samples held out.
        path: Weights of the path beside the block that ends here, from its input and to the output.
        gains: What such a path would win, where that was asked.
    """

    values: dict[str, Tensor]
    shift: Tensor | None
    ridge: float
    left: float
    path: tuple[Tensor, Tensor] | None = None
    gains: PathGains | None = None


class LayerFit:
    """The regression of one layer: what the stream lacks, from the inputs that the layer has left.

    With the stream ``S = f y + rest`` behind the layer's output ``y = W x + b``, it minimises over changes ``D, c``

        ``sum_t w_t || (S_dense - S_pruned)_t - f (D x_t + c) ||^2 + ridge``

    so that the layer makes up for its own lost inputs and for what the stream before it lacks already. The inputs are
    those that the layer has in the pruned model.

    Args:
        model: The model.
        path: Name of the layer.
        removed: Inputs of it that go.
        idle: Outputs of it that go.
        values: New values of parameters so far, by name.
        implanted: Outputs that an implant will compute.
        block: The block that ends here, if a path may lie beside it.
        rank: Of the path; None to find out what its directions would win, and go on without.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        removed: list[int],
        idle: Iterable[int],
        values: Mapping[str, Tensor],
        implanted: ImplantedRows | None = None,
        block: Block | None = None,
        rank: int | None = None,
    ) -> None:
        self.path = path
        self._model = model
        self._module = model.get_submodule(path)
        self._values = values
        self._implanted = implanted
        self._block, self._rank, self._beside = block, rank, 0
        self._energies = UnitEnergies(block, self._module) if block is not None and rank is None else None
        self._names = {id(p): name for name, p in model.named_parameters()}
        weight = self._module.get_parameter("weight")
        self._out = output_dim(self._module)
        self._takes_constant = isinstance(self._module.bias, nn.Parameter)
        staying = torch.ones(weight.shape[1 - self._out], dtype=torch.bool)
        staying[removed] = False
        self._kept = staying.nonzero().flatten().to(weight.device)
        self._used = torch.ones(weight.shape[self._out], dtype=torch.float64, device=weight.device)
        self._used[torch.tensor([*idle], dtype=torch.long, device=weight.device)] = 0
        self.sums: dict[str, Tensor] = {}
        self._factor: Tensor = torch.ones(())
        self._shift: tuple[str, Tensor] | None = None

    @property
    def _constant(self) -> bool:
        return self._takes_constant or self._shift is not None

    def add(
        self,
        dense: Stop,
        pruned: Stop,
        index: int,
        num_samples: int,
        weights: Tensor | None,
        beside: Tensor | None = None,
    ) -> None:
        """Count in a batch.

        Args:
            dense: The layer in the dense model.
            pruned: The same in the pruned one.
            index: Number of the batch among those of all processes.
            num_samples: Number of its samples.
            weights: Of its positions, in the shape of the input with one channel; all the same by default.
            beside: Input of the block in the pruned model, at the positions of the output.
        """
        way = pruned.way
        dtype = accumulation_dtype(way.tip.dtype)
        factor = way.factor.to(dtype)
        self._factor = factor.flatten()
        if not self._takes_constant and len(way.shifts) == 1:
            name = self._names.get(id(way.shifts[0][0]))
            self._shift = None if name is None else (name, way.shifts[0][1])
        least = factor.abs().amax() * _LEAST_FACTOR
        inverse = torch.where(factor.abs() > least, 1 / factor, torch.zeros_like(factor))
        dim = channel_dim(self._module)
        lacking = (dense.way.tip.to(dtype) - way.tip.to(dtype)) * inverse
        x = pruned.x.to(dtype).index_select(dim, self._kept)
        inputs = [x] if beside is None else [x, beside.to(dtype)]
        self._beside = 0 if beside is None else beside.shape[dim]
        for part, chosen in self._halves(len(x), max(len(x) // num_samples, 1), index):
            some = [t[chosen] for t in inputs]
            w = None if weights is None else weights[chosen].flatten()
            a, r = self._rows(some, lacking[chosen], index)
            columns = [torch.ones_like(a[:, :1])] * self._constant + [a]
            sums = dict(vars(Moments.of(torch.cat(columns, 1), r, w)))
            if self._energies is not None and part == "test":
                own, _ = self._rows([dense.x.to(dtype)[chosen]], lacking[chosen], index)
                sums["units"] = self._energies.moments(own, w)
            for name, value in sums.items():
                key = f"{part} {name}"
                add_to_(self.sums, key, value)

    def _halves(self, size: int, rows: int, index: int) -> list[tuple[str, Tensor]]:
        """Return the rows of the samples to fit and of those held out."""
        # By samples, not by positions, which resemble each other within a sample.
        out = (torch.arange(size, device=self._kept.device) // rows + index) % _HELD_OUT == _HELD_OUT - 1
        return [("train", (~out).nonzero().flatten()), ("test", out.nonzero().flatten())]

    def _rows(self, inputs: list[Tensor], lacking: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return what outputs are predicted from and what they lack; of images at some positions of each.

        Args:
            inputs: Those of the layer, and those of the block if there are any.
            lacking: What is to be predicted.
            index: Number of the batch: each has positions of its own.

        Returns:
            ``[positions, inputs * taps]``, and ``[positions, outputs]``.

        Raises:
            TypeError: If the kind of the layer does not know its patches.
        """
        if not spatial_dims(self._module):
            return torch.cat([x.flatten(0, -2) for x in inputs], 1), lacking.flatten(0, -2)
        rows = known(self._module).rows(
            self._module, inputs[0], lacking.shape[2:]
        )  # [images, inputs * taps, positions]
        if rows is None:
            raise TypeError(f"{self.path} says that it knows its rows, and returns none")
        parts = [rows, *(x.flatten(2) for x in inputs[1:]), lacking.flatten(2)]
        # Neighbouring positions say nearly the same, and each of them costs the square of the size of a patch.
        if rows.shape[-1] > _MOST_POSITIONS:
            order = torch.randperm(rows.shape[-1], generator=torch.Generator().manual_seed(index), device="cpu")
            some = order[:_MOST_POSITIONS].sort().values.to(rows.device)
            parts = [part.index_select(-1, some) for part in parts]
        *predicting, lacking = (part.movedim(1, -1).flatten(0, -2) for part in parts)
        return torch.cat(predicting, 1), lacking

    def solve(self, start: float) -> Fitted:
        """Fit the layer.

        Args:
            start: Strength of regularisation to begin with.

        Returns:
            What came of it.
        """
        parts = ("inputs", "across", "square")
        train, test = (Moments(*(self.sums[f"{half} {part}"] for part in parts)) for half in ("train", "test"))
        scale = (self._factor.double().square() * self._used).expand(len(self._used))
        values, shift, free = dict[str, Tensor](), None, int(self._constant)
        own = len(train.inputs) - self._beside
        fit = fit_held_out(train.first(own), test.first(own), free=free, scale=scale, start=start)
        solution, ridge, left, path, gains = fit.solution, fit.ridge, fit.left, None, None
        if self._block is not None:
            rank = min(self._rank or _MOST_DIRECTIONS, self._beside, len(scale))
            near = ridge if math.isfinite(ridge) else start
            low = fit_low_rank(train, test, beside=self._beside, rank=rank, free=free, scale=scale, start=near)
            if low is not None and self._rank is None:
                gains = self._what_paths_win(low.gains, scale, left)
            elif low is not None:
                solution, ridge, path = low.solution, low.ridge, (low.down, low.up)
        weight = self._module.get_parameter("weight").detach()
        if math.isfinite(ridge):
            values, shift = self._with_constant(solution[0] if self._constant else None)
            change = solution[free:]
            weight = self._plus(change.T.reshape(change.shape[1], len(self._kept), -1))  # [outputs, inputs, taps]
        if self._implanted is not None:
            moment = (train.inputs + test.inputs)[free:own, free:own]
            weight = self._implanted.approximated(self._module, weight, self._kept, moment)
        if self._implanted is not None or math.isfinite(ridge):
            values[f"{self.path}.weight"] = weight
        return Fitted(values, shift, ridge, left, path, gains)

    def _what_paths_win(self, gains: Tensor, scale: Tensor, left: float) -> PathGains:
        """Return what the directions of a path would win, beside what the units that go added."""
        assert self._block is not None and self._energies is not None  # noqa: PT018
        energies = self._energies.of(self.sums["test units"], scale)
        energy = energies[list(self._block.removed)].sum().item()
        return PathGains(self._block, gains, energy, left)

    def _plus(self, added: Tensor) -> Tensor:
        """Return the weight with something added for the inputs that stay, ``[outputs, inputs, taps]``."""
        weight = self._module.get_parameter("weight").detach()
        added = added.reshape(*added.shape[:2], *weight.shape[2:])
        added = added.transpose(0, 1) if self._out == 1 else added
        return weight.double().index_add(1 - self._out, self._kept, added).to(weight.dtype)

    def _with_constant(self, constant: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the bias that takes up a constant of the output, and what the stream gains where it is another's."""
        if constant is None:
            return {}, None
        if self._takes_constant:
            bias = f"{self.path}.bias"
            return {bias: self._raised(bias, constant)}, None
        if self._shift is None:
            raise TypeError(f"nothing behind {self.path} takes a constant")
        name, factor = self._shift
        gained = (self._factor * constant).to(self._factor.dtype)
        return {name: self._raised(name, factor * constant)}, gained.view(-1, *[1] * spatial_dims(self._module))

    def _raised(self, name: str, constant: Tensor) -> Tensor:
        bias = self._now(name)
        return (bias + constant).to(bias.dtype)

    def _now(self, name: str) -> Tensor:
        """Return the value that a parameter has by now."""
        return self._values[name] if name in self._values else self._model.get_parameter(name).detach()
