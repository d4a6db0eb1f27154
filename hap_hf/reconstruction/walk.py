"""Layer after layer, each fitted to the dense model on the inputs that it has in the pruned one."""

import logging
import math
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.precision import Precision
from hap_hf.layers.bypass import Bypass
from hap_hf.layers.projection import channel_dim, on_input
from hap_hf.model.masking import Units, channels
from hap_hf.model.state import restart_random_numbers
from hap_hf.names.group import Role
from hap_hf.reconstruction.blocks import Block, PathGains
from hap_hf.reconstruction.implanted import ImplantedRows
from hap_hf.reconstruction.layer import Fitted, LayerFit, Stop
from hap_hf.reconstruction.pausing import PausedForward
from hap_hf.reconstruction.stations import fitted_layers, stations
from hap_hf.reconstruction.stream import Following, Way

logger = logging.getLogger(__name__)

_FIRST_RIDGE = 1e-2


class Walk:
    """Fits layers one after the other, from the first to the last.

    Two forward passes of each batch, one of the dense and one of the pruned model, go from layer to layer together with
    those of all other batches: at each the layer is fitted on all batches, and the pruned passes go on with what it
    computes then. So it takes two forward passes of each batch, whatever the number of layers, and the moments of one
    layer at a time. Of every batch the activations at one place of the model are kept.

    Args:
        evidence: The model with all its units, which is left as found, and the batches.
        gone: The units that go.
        implanted: What implants will compute, by the name of the layer.
        blocks: Blocks that paths may lie beside, by the name of their last layer.
        ranks: Of the paths, by the same names; None to find out what paths would win, and go on without.

    Attributes:
        paths: Weights of the paths that were fitted, from the input and to the output, by the same names.
        gains: What paths would win.
    """

    def __init__(
        self,
        evidence: Evidence,
        gone: Units,
        implanted: Mapping[str, ImplantedRows] = MappingProxyType({}),
        blocks: Mapping[str, Block] = MappingProxyType({}),
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        gone = [(group, list(units)) for group, units in gone]
        # What is fitted is what the model computes by itself, whatever it was scored in.
        self._evidence = replace(evidence, precision=Precision.FP32)
        self._model = evidence.model
        self._steps = stations(evidence, fitted_layers(evidence.model))
        self._order = {path: place for place, path in enumerate(self._steps)}
        self._removed = {path: sorted(set(index)) for path, index in channels(gone, {Role.CONSUMER}).items()}
        self._implanted = implanted
        self._blocks = {path: b for path, b in blocks.items() if ranks is None or path in ranks}
        self._ranks = ranks or {}
        self._entered: dict[tuple[PausedForward, str], Tensor] = {}
        self._bypasses = [m for m in evidence.model.modules() if isinstance(m, Bypass)]
        self.paths: dict[str, tuple[Tensor, Tensor]] = {}
        self.gains: list[PathGains] = []
        self._idle = channels(gone, {Role.PRODUCER, Role.FACTOR})
        self._pruned: set[PausedForward] = set()
        self._following: dict[PausedForward, Following] = {}
        self._open: dict[PausedForward, tuple[str, Tensor, Tensor]] = {}
        self._shifts: dict[str, Tensor] = {}
        self._computing = False
        self._values: dict[str, Tensor] = {}
        self._done: set[str] = set()

    def _module(self, path: str) -> nn.Module:
        return self._model.get_submodule(path)

    @property
    def layers(self) -> Collection[str]:
        """Names of the layers that are fitted."""
        return self._steps.keys()

    def run(self, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fit all layers.

        Args:
            others: Values that other layers are to have, which cannot be fitted here, by name of the parameter.

        Returns:
            New values by name of the parameter; the columns that read units that go are as they were.
        """
        self._values = dict(others)
        self._done = {name.rpartition(".")[0] for name in others}
        with self._evidence.ready({}, "repair", "layer", len(self._steps)) as tick, self._hooked():
            samples = [
                (batch, sample)
                for batch, sample in zip(self._evidence.batches, self._evidence.samples(), strict=True)
                if sample.num_terms
            ]
            pairs = [(self._forward(sample.loss), self._forward(sample.loss)) for _, sample in samples]
            self._pruned = {pruned for _, pruned in pairs}
            ridge = _FIRST_RIDGE
            try:
                stops: dict[PausedForward, Stop | None] = {}
                for path in self._steps:
                    removed, idle = self._removed.get(path, []), self._idle.get(path, ())
                    beside = self._blocks.get(path), self._ranks.get(path)
                    fit = LayerFit(self._model, path, removed, idle, self._values, self._implanted.get(path), *beside)
                    for index, ((batch, sample), pair) in enumerate(zip(samples, pairs, strict=True)):
                        for forward in pair:
                            self._advance(forward, path, stops)
                        dense, pruned = (stops[forward] for forward in pair)
                        if dense is not None and pruned is not None and dense.path == pruned.path == path:
                            number = self._evidence.processes.number(index)
                            x = self._entered.get((pair[1], path))
                            fit.add(dense, pruned, number, sample.num_rows, _real(batch, pruned.x), x)
                        tick()
                    fit.sums = self._evidence.processes.summed("layer inputs", fit.sums)
                    if fit.sums:
                        ridge = self._adopt(path, fit.solve(ridge), ridge)
                    self._done.add(path)
            finally:
                for forward in (f for pair in pairs for f in pair):
                    forward.close()
        return self._values

    def _adopt(self, path: str, fitted: Fitted, ridge: float) -> float:
        """Let the pruned model go on with a layer's new values; return the strength to begin with at the next one."""
        self._evidence.processes.adopt_first_("reconstructed weights", fitted.values.values())
        self._values |= fitted.values
        if fitted.path is not None:
            self._evidence.processes.adopt_first_("bypasses", fitted.path)
            self.paths[path] = fitted.path
        self.gains += [] if fitted.gains is None else [fitted.gains]
        if fitted.shift is not None:
            self._shifts[path] = fitted.shift
        logger.debug("%s: ridge %g, %.3f of what it lacks is left", path, fitted.ridge, fitted.left)
        return fitted.ridge if math.isfinite(fitted.ridge) else ridge

    def _forward(self, loss: Callable[[], Tensor]) -> PausedForward:
        """Return a forward pass that stops behind each layer that is to be fitted."""
        following = Following(self._met)

        def run() -> None:
            with torch.no_grad(), torch.autocast(next(self._model.parameters()).device.type, enabled=False), following:
                loss()

        forward = PausedForward(run)
        self._following[forward] = following
        return forward

    def _advance(self, forward: PausedForward, path: str, stops: dict[PausedForward, Stop | None]) -> None:
        """Let a forward pass go on until it stands at a layer, or behind it if it does not come there."""
        while not forward.finished:
            stop = stops.get(forward)
            if stop is not None and self._order[stop.path] >= self._order[path]:
                return
            stops[forward] = forward.advance()

    @contextmanager
    def _hooked(self) -> Generator[None]:
        """Silence units in the forward passes of the pruned model, and stop behind the layers."""
        handles = [on_input(self._module(p), partial(self._silenced, p)) for p in self._removed]
        handles += [on_input(self._module(b.entry), partial(self._came_in, p)) for p, b in self._blocks.items()]
        # Before the hooks of the model: what a bypass of it adds behind the layer is one more stream.
        handles += [
            self._module(p).register_forward_hook(partial(self._came_out, p), with_kwargs=True, prepend=True)
            for p in {**self._steps, **dict.fromkeys(self._done)}
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _silenced(self, path: str, x: Tensor) -> Tensor | None:
        """Zero the units that go where a layer of the pruned model reads them."""
        if self._computing or PausedForward.running() not in self._pruned:
            return None
        index = torch.tensor(self._removed[path], dtype=torch.long, device=x.device)
        return x.index_fill(channel_dim(self._module(path)), index, 0)

    def _came_in(self, path: str, x: Tensor) -> None:
        """Keep the input of a block of the pruned model until its last layer is fitted."""
        forward = PausedForward.running()
        if forward is not None and forward in self._pruned and not self._computing:
            self._entered[forward, path] = self._blocks[path].aligned(x).clone()

    def _came_out(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        """Stop behind a layer, or begin to follow its output to where a stream is added."""
        forward = PausedForward.running()
        if forward is None or self._computing:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if path in self._done:  # not fitted here, or called in another order than in the example
            return self._computed(path, x).to(out.dtype) if forward in self._pruned else None
        # The way may lead through operations that change the tensor itself.
        y = out.clone() if forward in self._pruned else out
        way = Way.of(out, channel_dim(module))
        if self._steps[path]:
            self._open[forward] = path, x, y
            self._following[forward].way = way
        else:
            self._stop(forward, Stop(path, x, y, way))
        return None

    def _met(self, way: Way) -> None:
        """Stop where the last stream was added to the output of a layer."""
        forward = PausedForward.running()
        if forward is None or forward not in self._open:
            return
        path, x, y = self._open[forward]
        if way.steps == self._steps[path]:
            del self._open[forward]
            self._following[forward].way = None
            self._stop(forward, Stop(path, x, y, way))

    def _stop(self, forward: PausedForward, stop: Stop) -> None:
        """Wait until the layer is fitted, and go on with what it computes then."""
        # Of a model that has bypasses, each pass has its own directions under way.
        under_way = [bypass.handed.value for bypass in self._bypasses]
        forward.pause(stop)
        for bypass, value in zip(self._bypasses, under_way, strict=True):
            bypass.handed.value = value
        # Others have drawn meanwhile; from here on the dense and the pruned pass must draw the same.
        restart_random_numbers(self._model, self._evidence.seed + 1 + self._order[stop.path])
        if forward in self._pruned:
            # Into the very tensor that the model goes on with.
            change = self._computed(stop.path, stop.x) - stop.y
            stop.way.tip.add_((stop.way.factor * change).to(stop.way.tip.dtype))
            if stop.path in self._shifts:
                stop.way.tip.add_(self._shifts[stop.path])
            self._entered.pop((forward, stop.path), None)

    def _computed(self, path: str, x: Tensor) -> Tensor:
        """Return the output of a layer with the values that it has by now, in the dtype of its weight."""
        own = {f"layer.{n.removeprefix(f'{path}.')}": v for n, v in self._values.items() if n.startswith(f"{path}.")}
        module, forward = self._module(path), PausedForward.running()
        self._computing = True
        try:
            # Models that are trained in half precision may compute in it by themselves, and this may be inside or not.
            with torch.autocast(x.device.type, enabled=False):
                dtype = module.get_parameter("weight").dtype
                out: Tensor = functional_call(_WithoutHooks(module), own, (x.to(dtype),))
        finally:
            self._computing = False
        if forward is None or path not in self.paths or (forward, path) not in self._entered:
            return out
        (down, up), dim = (w.to(dtype) for w in self.paths[path]), channel_dim(module)
        return out + (self._entered[forward, path].to(dtype).movedim(dim, -1) @ down.T @ up.T).movedim(-1, dim)


class _WithoutHooks(nn.Module):
    """A layer as its forward computes it, whatever hooks do around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer.forward(x)
        return out


def _real(batch: Any, x: Tensor) -> Tensor | None:
    """Return 1 for tokens and 0 for padding, in the shape of an input with one channel; None where nothing says."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or x.dim() != 3 or mask.shape != x.shape[:2]:
        return None
    real = (mask != 0).to(x.device)
    return real[..., None] if real.any() else None
