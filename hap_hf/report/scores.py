"""Scores in a file, beside the report that they led to."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hap_hf.criteria import Scores
from hap_hf.errors import ConfigError
from hap_hf.report.files import open_tensors

SCORES_FILE = "pruning_scores.safetensors"
_TENSORS = ("sensitivity", "standard_error", "gone_in")
_WORDS = ("method", "num_probes", "num_batches", "num_loss_terms", "seconds", "settled")


def save_scores(scores: Scores, path: Path) -> None:
    """Write scores to one file: tensors, and all else in its header.

    Args:
        scores: The scores.
        path: The file.
    """
    # safetensors does not take two names for one tensor, nor views.
    tensors = {f"{part}/{n}": t.contiguous().clone() for part in _TENSORS for n, t in getattr(scores, part).items()}
    save_file(tensors, path, metadata={"scores": json.dumps({name: getattr(scores, name) for name in _WORDS})})


def load_scores(path: Path) -> Scores:
    """Return the scores that :func:`save_scores` wrote.

    Args:
        path: The file.

    Returns:
        The scores.

    Raises:
        ConfigError: If it is damaged, or holds no scores.
    """
    with open_tensors(path) as file:
        try:
            words = json.loads((file.metadata() or {}).get("scores", "null"))
        except ValueError:
            words = None
        if not isinstance(words, dict) or set(words) != set(_WORDS):
            raise ConfigError(f"expected scores in {path}, got a file of something else; save the report anew")
        parts: dict[str, Any] = {part: {} for part in _TENSORS}
        for key in file.keys():  # noqa: SIM118 (no mapping)
            part, _, name = key.partition("/")  # at the first slash: names of parts have none
            if part not in parts:
                raise ConfigError(f"expected one of {_TENSORS} in {path}, got {part!r}; save the report anew")
            parts[part][name] = file.get_tensor(key)
    return Scores(**parts, **words)
