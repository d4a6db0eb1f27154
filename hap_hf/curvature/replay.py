"""Per-sample gradients of any module's parameters: its call run again, one sample at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.curvature.hvp import accumulation_dtype
from hap_hf.curvature.layers import NotPerSampleError
from hap_hf.host import tree_flatten, tree_unflatten


class ReplayedCall:
    """A call of a module of any kind, which is run again and differentiated for one sample after the other.

    For norms, embeddings, layers with implants and whatever else owns a parameter. Slower than a closed form, and far
    faster than the whole model a sample.

    Args:
        module: The module, whose forward is called again without its hooks.
        args: Its arguments. One of them or of ``kwargs`` is a tensor, in which each sample has as many consecutive
            rows of the first dimension.
        kwargs: Its keyword arguments.

    Raises:
        NotPerSampleError: If there is not exactly one such tensor.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.module = module
        self._leaves, self._spec = tree_flatten((args, dict(kwargs)))
        places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        if len(places) != 1 or not self._leaves[places[0]].dim():
            raise NotPerSampleError(f"a {type(module).__name__} was called with {len(places)} tensors")
        self._place = places[0]
        self.x: Tensor = self._leaves[self._place].detach()
        self.reads_graph: bool = self._leaves[self._place].requires_grad

    @property
    def num_rows(self) -> int:
        """Size of the first dimension of the input."""
        return self.x.shape[0]

    def sample_gradients(
        self, attributes: Sequence[str], grad: Tensor, num_samples: int, samples: slice
    ) -> list[Tensor]:
        """Return the gradient of each of some samples.

        Args:
            attributes: Names of parameters of the module.
            grad: Gradient of the module's output.
            num_samples: Number of samples in it.
            samples: Which of them.

        Returns:
            For each parameter the gradients, ``[samples, *shape]``, in float32 (float64 for float64 weights).
        """
        parameters = [self.module.get_parameter(a) for a in attributes]
        of_input, of_output = self.num_rows // num_samples, grad.shape[0] // num_samples
        found: list[list[Tensor]] = [[] for _ in parameters]
        for n in range(samples.start, samples.stop):
            output = self._run(self.x[n * of_input : (n + 1) * of_input], parameters[0].dtype)
            part = grad[n * of_output : (n + 1) * of_output].to(output.dtype)
            gradients: Sequence[Tensor] = [torch.zeros_like(p) for p in parameters]
            if output.requires_grad:
                # Modules may keep parts of a graph for their next call, as LeViT does with its position biases.
                gradients = torch.autograd.grad(output, parameters, part, retain_graph=True, materialize_grads=True)
            for p, gradient, stack in zip(parameters, gradients, found, strict=True):
                stack.append(gradient.to(accumulation_dtype(p.dtype)))
        return [torch.stack(stack) for stack in found]

    def _run(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        leaves = list(self._leaves)
        # Under autocast a layer may have got another dtype than its weights have.
        leaves[self._place] = x.to(dtype) if x.is_floating_point() else x
        args, kwargs = tree_unflatten(leaves, self._spec)
        with torch.enable_grad():
            output: Tensor = self.module.forward(*args, **kwargs)  # not the module itself, whose hooks have run
        return output
