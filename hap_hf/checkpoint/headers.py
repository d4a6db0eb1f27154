"""What a checkpoint says of itself without its weights: its plan, and the shapes in the headers of its files."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hap_hf.checkpoint.entry import QUANT_METHODS, HapPlanConfig
from hap_hf.errors import ConfigError, PlanFormatError
from hap_hf.names.plan import PruningPlan
from hap_hf.report.files import open_tensors


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself.

    Args:
        architecture: Name of the model's class.
        plan: What was done to it; None where its config carries nothing of hap_hf.
        params: Entries of all tensors in the files; buffers that are saved count, too.
        num_bytes: Size of these tensors.
    """

    architecture: str
    plan: PruningPlan | None
    params: int
    num_bytes: int


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def read_header(model: str | os.PathLike[str], revision: str | None = None) -> Header:
    """Return what a checkpoint says of itself; of one on the Hub, only headers are downloaded.

    Args:
        model: A folder, or a name on the Hub.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The header.

    Raises:
        ConfigError: If there is no such checkpoint, it may not be read, or its weights are no safetensors or damaged.
        PlanFormatError: If it carries something that is no plan.
    """
    folder = Path(model)
    check_is_no_file(folder)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise ConfigError(f"{folder} has no config.json, so it is no checkpoint of a model")
        files = sorted(folder.glob("*.safetensors"))
        # Scores lie beside weights.
        tensors = [t for file in files if file.name.startswith(("model", "diffusion")) for t in _local(file)]
        return _header(config, tensors, str(folder))
    try:
        config = Path(huggingface_hub.hf_hub_download(str(model), "config.json", revision=revision))
        found = huggingface_hub.get_safetensors_metadata(str(model), revision=revision)
    except GatedRepoError as error:
        raise ConfigError(f"{model} is gated: ask for access on its page, and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"there is no folder {str(model)!r}, and the Hub has no such model or keeps it private; if it is yours, "
            "log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    # Names that the Hub does not allow are a ValueError, and no connection is one of several others.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"there is no folder {str(model)!r}, and it could not be read from the Hub: {error}"
        ) from error
    entries = [t for file in found.files_metadata.values() for t in file.tensors.values()]
    return _header(config, [(t.dtype, t.shape) for t in entries], str(model))


def check_is_no_file(model: str | os.PathLike[str]) -> None:
    """Check that a file was not given in place of its folder.

    Args:
        model: A folder, or a name on the Hub.

    Raises:
        ConfigError: If it is a file.
    """
    path = Path(model)
    if path.is_file():
        raise ConfigError(f"{path} is a file; name the folder that holds the model, {str(path.parent)!r}")


def _local(file: Path) -> Iterable[tuple[str, list[int]]]:
    with open_tensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            part = opened.get_slice(name)
            yield part.get_dtype(), part.get_shape()


def _header(config: Path, tensors: list[tuple[str, list[int]]], name: str) -> Header:
    try:
        values: Any = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanFormatError(f"config.json of {name} is no JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise PlanFormatError(f"config.json of {name} must be an object, got {type(values).__name__}")
    if not tensors:
        raise ConfigError(f"{name} has no weights in safetensors, whose headers say what is left")
    slot, classes = values.get("quantization_config"), values.get("architectures")
    ours = isinstance(slot, Mapping) and slot.get("quant_method") in QUANT_METHODS
    plan = HapPlanConfig.from_dict(slot).plan if ours and isinstance(slot, Mapping) else None
    return Header(
        str(classes[0])[:80] if isinstance(classes, list) and classes else "unknown",
        plan,
        sum(prod(shape) for _, shape in tensors),
        sum(prod(shape) * _BYTES.get(dtype, 1) for dtype, shape in tensors),
    )
