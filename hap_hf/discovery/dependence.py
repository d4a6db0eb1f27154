"""Which input channels of a projection depend on which output channels of which others.

The answers come from a cut-open forward pass (:mod:`hap_hf.discovery.record`). For a convolution behind a residual add,
one channel's gradient touches the same channel of every convolution that was added up; for the output projection of an
attention, one head's rows of the query, key and value projections; behind a layer norm it touches everything.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hap_hf.discovery.record import Recording
from hap_hf.layers.projection import channel_dim

SHARED, UNUSED = -1, -2


class Dependence:
    """Answers about the input of one projection, or about the model's outputs.

    Args:
        recording: The cut-open forward pass.
        targets: The tensors asked about.
        dim: The dimension along which their channels lie.
    """

    def __init__(self, recording: Recording, targets: list[Tensor], dim: int = -1) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._targets = [t for t in targets if t.requires_grad]
        self._dim = dim
        self._channel_dims = {n: channel_dim(recording.projections[n]) for n in recording.leaves}
        names = {id(t): n for n, leaves in recording.leaves.items() for t in leaves}
        names |= {id(t): n for n, t in recording.parameters.items()}
        behind = reached(names, self._targets)
        every = [(n, leaf) for n, leaves in recording.leaves.items() for leaf in leaves if n in behind]
        self._sources = every + [(n, p) for n, p in recording.parameters.items() if n in behind]
        # Random cotangents: equal ones would cancel behind a layer norm or a softmax. Positive ones: sums over
        # positions keep their digits.
        self._cotangents = [
            torch.rand(t.shape, generator=self._generator).add_(0.5).to(t.device, t.dtype) for t in self._targets
        ]

    @property
    def sources(self) -> set[str]:
        """Names of the projections and parameters that lie behind the targets."""
        return {n for n, _ in self._sources}

    @property
    def leaves(self) -> set[str]:
        """Names of the projections that lie behind the targets."""
        return self.sources & set(self._channel_dims)

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that lie behind the targets."""
        return self.sources - self.leaves

    def gradients(self, weights: Tensor | None, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the gradients of a weighted sum of the channels.

        Args:
            weights: A weight for each channel of the targets, ``[channels]``; None for one of each.
            without: Names of sources not to ask about.

        Returns:
            For each source projection ``[features, positions]``, for each parameter in its shape.
        """
        sources = [s for s in self._sources if s[0] not in without]
        cotangents = self._cotangents
        if weights is not None:
            cotangents = [c * weights.to(c.device, c.dtype).view(-1, *[1] * (-1 - self._dim)) for c in cotangents]
        found = torch.autograd.grad(
            self._targets, [s for _, s in sources], cotangents, retain_graph=True, allow_unused=True
        )
        parts: dict[str, list[Tensor]] = {}
        for (name, source), gradient in zip(sources, found, strict=True):
            g = torch.zeros_like(source) if gradient is None else gradient
            dim = self._channel_dims.get(name)
            # A layer that was called several times has a leaf for each call: the same features, more positions.
            parts.setdefault(name, []).append(g if dim is None else g.movedim(dim, 0).flatten(1))
        return {name: torch.cat(each, 1) if name in self._channel_dims else each[0] for name, each in parts.items()}

    def touched(self, channels: Tensor | None, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Return which source entries the given channels depend on.

        Args:
            channels: Mask over the targets' channels, ``[channels]``; None for all.
            without: Names of sources not to ask about.

        Returns:
            A mask over the features of each source projection and the entries of each parameter.
        """
        found = self.gradients(channels, without)
        # Exact zeros: a channel of weight zero adds nothing else however long the path is, and random numbers do not
        # cancel to one. NaN, as of zero times infinity, counts as a dependence: in doubt a unit stays.
        return {n: ((g != 0).any(1) if n in self._channel_dims else (g != 0).flatten()).cpu() for n, g in found.items()}

    def owners(self, units: Tensor) -> dict[str, Tensor]:
        """Return for each feature of the source projections the one unit of target channels that depends on it.

        Let all channels of a unit have the same weight. Gradients are linear in the weights, so an entry that serves
        one unit has that unit's weight times its gradient under weights of one, wherever the path between them leads.
        So the ratio of both gradients is the weight. Weights that count the units tell which unit it is; random
        weights tell whether it is a single one, as a mixture of several has no unit's weight in both.

        Args:
            units: Unit of each channel of the targets, ``[channels]``.

        Returns:
            For each source projection a unit for each feature; ``SHARED`` where several units need it, ``UNUSED`` where
            none does.
        """
        tests = self._tests(units, self.parameters)
        return {name: tests.owners(name, plain) for name, plain in tests.plain.items()}

    def some_owned(self, units: Tensor) -> bool:
        """Return whether some feature of a source projection may serve a single unit: half of what :meth:`owners` asks.

        Args:
            units: Unit of each channel of the targets, ``[channels]``.

        Returns:
            False only where :meth:`owners` would find no such feature.
        """
        weights = torch.rand(int(units.max()) + 1, generator=self._generator, dtype=torch.float64).add_(1)
        plain, answers = self.gradients(None, self.parameters), self.gradients(weights[units], self.parameters)
        for name, rows in plain.items():
            ratio, rest = _fit(rows.double(), answers[name].double())
            nearest = _distance(ratio.cpu(), weights)
            used = (rows != 0).any(1).cpu()
            if bool((used & (nearest < _TOLERANCE) & (rest.cpu() < _TOLERANCE)).any()):
                return True
        return False

    def aligned(self, units: Tensor) -> tuple[dict[str, tuple[int, Tensor]], set[int]]:
        """Return the parameters that can be cut along one dimension as the units are: a unit for each index.

        Args:
            units: Unit of each channel of the targets, ``[channels]``.

        Returns:
            The dimension and the unit of each index, ``UNUSED`` where none depends on it, by name; and the units that
            own single entries of a parameter that cannot be cut so.
        """
        aligned: dict[str, tuple[int, Tensor]] = {}
        scattered: set[int] = set()
        if not self.parameters:
            return aligned, scattered
        tests = self._tests(units, self.leaves)
        for name, plain in tests.plain.items():
            # All entries at an index must belong to one unit, as surgery takes out whole indices.
            for dim in range(plain.dim()):
                found = tests.owners(name, plain.movedim(dim, 0).flatten(1) if plain.dim() > 1 else plain[:, None], dim)
                if bool((found >= 0).any()) and not bool((found == SHARED).any()):
                    aligned[name] = dim, found
                    break
            else:
                # Entries that one unit owns, but that no cut takes out, would stay behind when it goes.
                single = tests.owners(name, plain.reshape(-1, 1))
                scattered |= set(single[single >= 0].tolist())
        return aligned, scattered

    def _tests(self, units: Tensor, without: Collection[str]) -> "_Tests":
        """Return the gradients under weights that tell units apart: four backward passes, however many units."""
        num_units = int(units.max()) + 1
        # All weights lie between 1 and 2. A zero would look like an entry that no unit needs.
        random = torch.rand(2, num_units, generator=self._generator, dtype=torch.float64).add_(1)
        counting = torch.arange(num_units, dtype=torch.float64) / num_units + 1
        answers = [self.gradients(code[units], without) for code in (counting, *random)]
        return _Tests(self.gradients(None, without), answers, random)


@dataclass(frozen=True, eq=False)
class _Tests:
    """Gradients under weights that tell units apart.

    Args:
        plain: Gradients under weights of one, by source.
        answers: Gradients under weights that count the units, and under two sets of random ones.
        random: The random weights, ``[2, units]``.
    """

    plain: dict[str, Tensor]
    answers: list[dict[str, Tensor]]
    random: Tensor

    def owners(self, name: str, rows: Tensor, dim: int | None = None) -> Tensor:
        """Return the unit of each row of entries of a source.

        The weight of a row is the r for which r times its plain gradient is nearest to the gradient under the test's
        weights, in least squares. What is left between both is large where entries of the row differ in their units.

        Args:
            name: Name of the source.
            rows: Its plain gradient, ``[rows, entries]``.
            dim: Dimension of the gradient along which the rows lie; None where it has the shape of ``rows``.

        Returns:
            Units, ``SHARED`` or ``UNUSED``, ``[rows]``.
        """
        base = rows.double()
        used = (base != 0).any(1)
        answers = [a[name] if dim is None else a[name].movedim(dim, 0) for a in self.answers]
        fits = [_fit(base, a.reshape(base.shape).double()) for a in answers]
        num_units = self.random.shape[1]
        # Unit u counts as 1 + u / num_units. Two units mixed read as one between them, which the random weights deny.
        counted = fits[0][0].nan_to_num()
        unit = ((counted - 1) * num_units).round().long().clamp(0, num_units - 1).cpu()
        single = torch.ones(len(unit), dtype=torch.bool)
        for code, (ratio, rest) in zip(self.random, fits[1:], strict=True):
            single &= ((ratio.cpu() - code[unit]).abs() < _TOLERANCE) & (rest.cpu() < _TOLERANCE)  # false for NaN
        unit[~single] = SHARED
        unit[~used.cpu()] = UNUSED
        return unit


def _fit(base: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the r for which ``r * base`` is nearest to ``test``, and what is left between both."""
    energy = base.square().sum(1)
    safe = torch.where(energy != 0, energy, 1.0)
    ratio = (base * test).sum(1) / safe
    return ratio, (test - ratio[:, None] * base).square().sum(1).div(safe).sqrt()


def _distance(values: Tensor, among: Tensor) -> Tensor:
    """Return how far each value is from the nearest of some numbers."""
    ordered = among.sort().values
    above = torch.searchsorted(ordered, values.contiguous()).clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    return torch.minimum((ordered[above] - values).abs(), (values - ordered[below]).abs())


# Two units mixed in one entry differ from either by about the difference of two random numbers.
_TOLERANCE = 1e-3


def reached(names: Mapping[int, str], targets: Iterable[Tensor]) -> set[str]:
    """Return which variables some tensors were computed from, read off the autograd graph.

    Args:
        names: Names of variables by id.
        targets: Tensors, with or without a graph.

    Returns:
        The names of those that were used.
    """
    found, seen = set(), set()
    pending = [t.grad_fn for t in targets]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the nodes at the graph's ends have one
        if variable is not None and id(variable) in names:
            found.add(names[id(variable)])
        pending += [n for n, _ in node.next_functions]
    return found


# Gradients of larger parameters, such as word embeddings, cost more than they tell.
_LARGE = 2**20


def everything_behind(recording: Recording, targets: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return all source entries that the targets depend on; of large parameters all or nothing.

    Args:
        recording: The cut-open forward pass.
        targets: Tensors with a graph.

    Returns:
        A mask over the features of each source projection and the entries of each parameter.
    """
    dependence = Dependence(recording, list(targets))
    large = {n for n in dependence.parameters if recording.parameters[n].numel() > _LARGE}
    whole = {n: torch.ones(recording.parameters[n].numel(), dtype=torch.bool) for n in large}
    return dependence.touched(None, large) | whole if dependence.sources - large else whole
