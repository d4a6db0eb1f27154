"""How far the outputs of a student are from those of its teacher: the terms of distillation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hap_hf.errors import UnsupportedModelError
from hap_hf.evidence.losses import IGNORED_LABEL

REGRESSION, MULTI_LABEL = "regression", "multi_label_classification"


def named_outputs(outputs: Any, ending: str) -> dict[str, Any]:
    """Return the outputs of a model whose names end in something.

    Args:
        outputs: What a model returned: a mapping, an object with attributes, or a tensor, which is its logits.
        ending: The end of the names.

    Returns:
        Those that are there, by name.
    """
    if isinstance(outputs, Tensor):
        outputs = {"logits": outputs}
    elif not isinstance(outputs, Mapping):
        outputs = getattr(outputs, "__dict__", {})
    return {name: value for name, value in outputs.items() if name.endswith(ending) and value is not None}


def logits_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, problem: str | None, labels: Tensor | None, shifted: bool
) -> Tensor:
    r"""Return the distance of the student's answers from the teacher's, a mean over positions.

    With softened probabilities :math:`p = \mathrm{softmax}(z / T)` it is :math:`T^2 \, KL(p_t \| p_s)`, whose gradient
    has the size of that of the cross-entropy whatever the temperature (Hinton, Vinyals and Dean, "Distilling the
    Knowledge in a Neural Network", 2015, section 2). With several labels a sample it is the same of each label's two
    outcomes, a mean over labels; in a regression the squared difference, a mean over outputs, without temperature.

    Args:
        student: Logits, ``[*positions, classes]``; of images with a class a pixel ``[batch, classes, height, width]``.
        teacher: The teacher's.
        temperature: The temperature T.
        problem: The ``problem_type`` of transformers; None for one class a position.
        labels: Positions whose label is -100 do not count, if there is one label a position.
        shifted: Whether position t answers the label of position t + 1, as in causal language models.

    Returns:
        The mean, a scalar; 0 where no position counts.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(dtype), teacher.to(dtype)
    if problem == REGRESSION:
        return (s - t).square().mean()
    if problem == MULTI_LABEL:
        p = torch.sigmoid(t / temperature)
        # Cross-entropy and entropy of two outcomes from their logits, which saturates nowhere.
        cross = functional.binary_cross_entropy_with_logits(s / temperature, p, reduction="none")
        entropy = functional.binary_cross_entropy_with_logits(t / temperature, p, reduction="none")
        return temperature**2 * (cross - entropy).mean()
    if s.dim() > 3:
        s, t = s.movedim(1, -1), t.movedim(1, -1)
    log_s, log_t = (functional.log_softmax(z / temperature, -1) for z in (s, t))
    each = temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    if labels is not None and shifted and labels.shape == each.shape:
        each, labels = each[:, :-1], labels[:, 1:]
    if labels is None or labels.is_floating_point() or labels.shape != each.shape:
        return each.mean()
    return masked_mean(each, labels != IGNORED_LABEL)


def hidden_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    r"""Return the distance of one hidden state from the teacher's.

    Of equal widths it is :math:`\|s - t\|^2 / \|t\|^2`, so that no layer counts for more because its numbers are
    larger. A feature map with fewer channels than the teacher's is compared through its spatial attention map
    :math:`q = \sum_c F_c^2`, by :math:`\| q_s / \|q_s\| - q_t / \|q_t\| \|^2`, a mean over images (Zagoruyko and
    Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2 with p = 2).

    Args:
        student: Hidden state, ``[batch, length, width]`` or ``[batch, channels, height, width]``.
        teacher: The teacher's.
        mask: Which positions count, ``[batch, length]``; all where it has another shape.

    Returns:
        The distance, a scalar.

    Raises:
        UnsupportedModelError: If the two cannot be compared.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(dtype), teacher.to(dtype)
    tiny = torch.finfo(dtype).tiny
    if s.shape == t.shape:
        if mask is not None and mask.shape == s.shape[:-1]:
            s, t = s * mask[..., None], t * mask[..., None]
        return (s - t).square().sum() / t.square().sum().clamp_min(tiny)
    if s.dim() == 4 and s.shape[2:] == t.shape[2:] and s.shape[0] == t.shape[0]:
        maps = (functional.normalize(x.square().sum(1).flatten(1), dim=1) for x in (s, t))
        return torch.sub(*maps).square().sum(1).mean()
    raise UnsupportedModelError(
        f"expected hidden states of the same shape as the teacher's, or feature maps of the same height and width, got "
        f"{list(student.shape)} and {list(teacher.shape)}; leave hidden at 0, or pass a teacher of the same family"
    )


def attention_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the Kullback-Leibler divergence of one layer's attention from the teacher's, a mean over queries.

    Heads that were removed have no counterpart, so the maps are means over heads.

    Args:
        student: Attention maps, ``[batch, heads, queries, keys]``.
        teacher: The teacher's.
        mask: Which queries count, ``[batch, queries]``; all where it has another shape.

    Returns:
        The divergence, a scalar; 0 where the layer has no heads left.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    if not student.shape[1]:
        return torch.zeros((), dtype=dtype, device=student.device)
    s, t = student.to(dtype).mean(1), teacher.to(dtype).mean(1)
    each = (torch.xlogy(t, t) - t * s.clamp_min(torch.finfo(dtype).tiny).log()).sum(-1)
    return each.mean() if mask is None or mask.shape != each.shape else masked_mean(each, mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of some values; 0 where there are none.

    Args:
        values: Any values.
        mask: Which of them count, in the same shape.

    Returns:
        The mean, a scalar.
    """
    weights = (mask != 0).to(values.dtype)
    # where, as 0 * inf in a padded position is not 0
    return torch.where(mask != 0, values, 0).sum() / weights.sum().clamp_min(1)


def layerwise(
    kind: str, student: Any, teacher: Any, masks: Mapping[str, Tensor | None], distance: Any, advice: str
) -> Tensor:
    """Return the mean over layers of a distance between outputs that come a tensor a layer.

    Args:
        kind: How the names of these outputs end: ``hidden_states`` or ``attentions``.
        student: What the student returned.
        teacher: What the teacher returned.
        masks: Which positions count, for outputs of an encoder (``encoder``) and for all others (``own``).
        distance: The distance of two tensors, given a mask.
        advice: What to do where the model returns none.

    Returns:
        The mean, a scalar.

    Raises:
        UnsupportedModelError: If the two return none, or different numbers of them.
    """
    found, wanted = named_outputs(student, kind), named_outputs(teacher, kind)
    terms = []
    for name, layers in found.items():
        if len(layers) != len(wanted.get(name, ())):
            raise UnsupportedModelError(
                f"expected as many {name} as the teacher returns, got {len(layers)} and {len(wanted.get(name, ()))}; "
                "pass a teacher with as many layers"
            )
        mask = masks["encoder" if name.startswith("encoder") else "own"]
        terms += [
            distance(s, t, mask) for s, t in zip(layers, wanted[name], strict=True) if s is not None and t is not None
        ]
    if not terms:
        raise UnsupportedModelError(f"the model returned no {kind}; {advice}")
    return torch.stack(terms).mean()
