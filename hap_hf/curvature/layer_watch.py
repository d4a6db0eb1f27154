"""Watching the layers of a model, so that one backward pass gives the gradients of every sample."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from hap_hf.curvature.graph import not_a_view, reached_otherwise
from hap_hf.curvature.hvp import listed
from hap_hf.curvature.input_watch import (
    InputCall,
    InputListener,
    ReadInput,
    branch,
    gradient_moment,
    position_weights,
    read_by_mask,
)
from hap_hf.curvature.layers import MatrixCall, NotPerSampleError, multiplies_by_matrix
from hap_hf.curvature.marginals import Marginals, Wanted, chunks
from hap_hf.curvature.replay import ReplayedCall
from hap_hf.curvature.sums import add_to_
from hap_hf.host import own_parameters
from hap_hf.layers.projection import channel_dim, on_input


@dataclass(frozen=True)
class _Seen:
    """A call of a module that owns some of the weights, and the edge of the graph at its output."""

    call: MatrixCall | ReplayedCall | InputCall
    attributes: Mapping[str, str]  # of the module, by the name of the weight
    output: GradientEdge
    output_shape: torch.Size
    output_dtype: torch.dtype


class LayerWatch:
    """Hooks on the modules that own some weights, for as long as a ``with`` block lasts.

    A weight may be used by several calls, of one module or of several: their gradients are added up for each sample
    before the statistic is taken. A use outside the module that owns the weight is not seen.

    Args:
        model: The model, in which only the weights require gradients.
        wanted: The weights, and what is asked for.
        listener: Is going to be told what some layers read, and of the gradients there.
    """

    def __init__(self, model: nn.Module, wanted: Wanted, listener: InputListener | None = None) -> None:
        self.model, self.wanted, self._listener = model, wanted, listener
        self._listened = {id(model.get_submodule(path)): path for path in (listener.paths if listener else ())}
        self.read: list[ReadInput] = []  # by the listened layers since the recording began
        # At these inputs, from the last backward pass; moments by name of the layer.
        self.read_weights: dict[int, Tensor] = {}
        self.read_gradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Seen] = []
        self._obstacle: NotPerSampleError | None = None
        self._recording = False
        self._on_gradient: Callable[[int, Tensor], None] | None = None

    def __enter__(self) -> Self:
        """Hang up the hooks."""
        names = {id(t): name for name, t in self.wanted.tensors.items()}
        for module in self.model.modules():
            attributes = {names[id(p)]: a for a, p in own_parameters(module).items() if id(p) in names}
            masks = bool(attributes) and read_by_mask(module, attributes, self.wanted.dims, self.wanted.statistic)
            if masks or id(module) in self._listened:
                path, channels = self._listened.get(id(module)), channel_dim(module)
                self._handles.append(on_input(module, partial(self._branch, path, channels)))
            if attributes:
                hook = partial(self._record, attributes, masks)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks down."""
        for handle in self._handles:
            handle.remove()
        self._calls.clear()
        self.read.clear()
        self.read_weights, self.read_gradients = {}, {}

    @contextmanager
    def recording(self) -> Generator[None, None, None]:
        """Remember the calls inside the block, and forget all others.

        Yields:
            Nothing; the calls are kept until the next recording.
        """
        self._calls, self._obstacle, self._recording, self.read = [], None, True, []
        try:
            yield
        finally:
            self._recording = False

    def _branch(self, path: str | None, channels: int, x: Tensor) -> Tensor | None:
        """Put a branch of its own in the place of what a layer reads."""
        if not self._recording:
            return None
        own = branch(x)
        if path is not None:
            register: Callable[[Callable[[Tensor], None]], object] = own.register_hook
            # A hook that held the input would keep the whole graph alive: no collector sees a circle through it.
            register(partial(self._weigh, len(self.read), channels))
            self.read.append(ReadInput(path, own, channels))
        return own

    def _weigh(self, index: int, channels: int, grad: Tensor) -> None:
        """Take the gradient of what a layer read."""
        self.read_weights[index] = position_weights(grad, channels)
        path = self.read[index].path
        if self._listener is not None and path in self._listener.gradients_at:
            add_to_(self.read_gradients, path, gradient_moment(grad, channels))

    def _record(
        self,
        attributes: Mapping[str, str],
        masks: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Any,
        output: Any,
    ) -> None:
        # Without a graph no path to the loss leads through this call.
        if not self._recording or (isinstance(output, Tensor) and not output.requires_grad):
            return
        try:
            if not isinstance(output, Tensor) or not output.dim():
                raise NotPerSampleError(f"a {type(module).__name__} returned something else than one tensor of samples")
            call: MatrixCall | ReplayedCall | InputCall
            if masks:
                call = InputCall(module, args[0] if args else next(iter(kwargs.values())))
            elif multiplies_by_matrix(module):
                call = MatrixCall(module, args[0] if args else next(iter(kwargs.values())))
            else:
                call = ReplayedCall(module, args, kwargs)
        except NotPerSampleError as obstacle:
            self._obstacle = obstacle
            return
        # The edge and the hook stay with this value, also when an activation overwrites the tensor in place.
        value = output if isinstance(call, ReplayedCall) else not_a_view(output)
        edge = get_gradient_edge(value)
        self._calls.append(_Seen(call, attributes, edge, output.shape, output.dtype))
        hooked = call.x if isinstance(call, InputCall) else value
        shape = hooked.shape if isinstance(call, InputCall) else output.shape
        register: Callable[[Callable[[Tensor], None]], object] = hooked.register_hook
        register(partial(self._pass_on, len(self._calls) - 1, shape))

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding may make to the gradients of the recorded calls."""
        half = any(s.output_dtype in {torch.float16, torch.bfloat16} for s in self._calls)
        return 0.1 if half else 1e-3

    def _pass_on(self, index: int, shape: torch.Size, grad: Tensor) -> None:
        """Take the gradient of a recorded output or input, as autograd reaches it on its way to the sources."""
        if self._on_gradient is not None:
            self._on_gradient(index, grad.reshape(shape))

    def marginals(self, num_samples: int, targets: Sequence[Tensor], vectors: Sequence[Tensor]) -> Marginals:
        """Return the statistic of the gradient of ``sum_k <targets_k, vectors_k>`` for each sample.

        Args:
            num_samples: Number of samples. Each has as many consecutive rows of every layer's input and output.
            targets: Tensors computed from the recorded calls; their graph is kept.
            vectors: A tensor in the shape of each.

        Returns:
            The sums, zero for weights that the targets do not depend on.

        Raises:
            NotPerSampleError: If a recorded call cannot be split into the samples, or the targets depend on a weight
                in a way that was not recorded.
        """
        if self._obstacle is not None:
            raise self._obstacle
        for seen in self._calls:
            if seen.call.num_rows % num_samples or seen.output_shape[0] % num_samples:
                raise NotPerSampleError(
                    f"a {type(seen.call.module).__name__} has {seen.call.num_rows} rows for {num_samples} samples"
                )
        # What follows is right only if each path to a weight crosses an output of a recorded call of its own.
        crossed = [(seen.output, seen.attributes) for seen in self._calls]
        if missed := reached_otherwise(targets, self.wanted.tensors, crossed):
            raise NotPerSampleError(
                f"{listed(missed)} is used outside its layer, or that layer's output was overwritten in place"
            )
        uses = Counter(name for seen in self._calls for name in seen.attributes)
        found = self.wanted.zeros(num_samples)
        # With their calls; all other gradients are reduced at once and need not be kept.
        later: dict[int, tuple[MatrixCall | ReplayedCall, Tensor]] = {}
        masks: Marginals = {}
        self.read_weights, self.read_gradients = {}, {}

        def arrived(index: int, grad: Tensor) -> None:
            call, attributes = self._calls[index].call, self._calls[index].attributes
            if isinstance(call, InputCall):  # linear in the gradient, so that uses add up
                sums = call.products(grad, num_samples)
                masks.update({(name, call.dim): masks.get((name, call.dim), 0) + sums for name in attributes})
                return
            # A statistic need not be linear: (a + b)^2 is not a^2 + b^2, so gradients of several uses are added first.
            if isinstance(call, ReplayedCall) or any(uses[name] > 1 for name in attributes):
                later[index] = call, grad
                return
            for name, attribute in attributes.items():
                dims, statistic = self.wanted.dims[name], self.wanted.statistic
                each = call.marginals(attribute, dims, grad, num_samples, statistic)
                found.update({(name, d): x for d, x in each.items()})

        sources = self._sources()
        if sources:
            self._on_gradient = arrived
            try:
                # Asked for what lies at the beginning, autograd computes no gradient of a weight on the way.
                torch.autograd.grad(targets, sources, vectors, retain_graph=True, allow_unused=True)
            finally:
                self._on_gradient = None
        found.update(self._added_up(later, num_samples))
        # A weight may be read through its layer's input, and through the replayed call of another one.
        return found | {key: found[key].to(sums) + sums for key, sums in masks.items()}

    def _sources(self) -> list[GradientEdge]:
        """Return where all backward paths through the recorded calls end: gradients asked for here pass all of them."""
        sources: list[GradientEdge] = []
        ahead: list[Node | None] = []
        for seen in self._calls:
            # Where the input has a graph, the path goes on to an earlier call and passes this one on the way.
            if seen.call.reads_graph:
                ahead.append(seen.output.node)
            else:
                sources.append(seen.output)
        # Inputs that require gradients themselves, as after enable_input_require_grads() of transformers.
        weights = {id(t) for t in self.wanted.tensors.values()}
        visited: set[Node] = set()
        while ahead:
            node = ahead.pop()
            if node is not None and node not in visited:
                visited.add(node)
                leaf = getattr(node, "variable", None)
                if leaf is not None and id(leaf) not in weights:
                    sources.append(get_gradient_edge(leaf))
                ahead.extend(following for following, _ in node.next_functions)
        return sources

    def _added_up(self, grads: Mapping[int, tuple[MatrixCall | ReplayedCall, Tensor]], num_samples: int) -> Marginals:
        """Return what is asked for from gradients written out, added over the calls that use a weight."""
        users: dict[str, tuple[int, ...]] = {}
        for index in sorted(grads):
            for name in self._calls[index].attributes:
                users[name] = (*users.get(name, ()), index)
        together: dict[tuple[int, ...], list[str]] = {}  # weights of one module are differentiated in one go
        for name, indices in users.items():
            together.setdefault(indices, []).append(name)
        found: dict[tuple[str, int], list[Tensor]] = {}
        for indices, names in together.items():
            size = 3 * sum(self.wanted.tensors[n].numel() * 4 for n in names)  # gradients, their sum, the statistic
            for samples in chunks(num_samples, size):
                totals: list[Tensor] | None = None
                for index in indices:
                    (call, grad), attributes = grads[index], self._calls[index].attributes
                    gradients = call.sample_gradients([attributes[n] for n in names], grad, num_samples, samples)
                    # [samples, *shape] of each weight
                    totals = gradients if totals is None else [a + b for a, b in zip(totals, gradients, strict=True)]
                for name, total in zip(names, totals or (), strict=True):
                    for key, sums in self.wanted.of_gradients(name, total).items():
                        found.setdefault(key, []).append(sums)
        return {key: torch.cat(parts) for key, parts in found.items()}
