"""Files that run without hap_hf: ONNX, with integers or without, and programs of torch.export."""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hap_hf.errors import ConfigError, ExportError, UnsupportedModelError
from hap_hf.export.integers import with_integers, with_rounded_weights
from hap_hf.export.onnx import fold_batch_norms_, round_sums_, strip_
from hap_hf.export.program import Logits, dynamic_dims, fewer, inputs_of
from hap_hf.host import is_compiled
from hap_hf.model.adapters import check_no_adapters
from hap_hf.names.checks import member

logger = logging.getLogger(__name__)

_OPSET = 21
_MOST_BYTES = 1_900_000_000
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = {False: 1e-3, True: 0.1}
"""How far the file's logits may be from the model's, as a share of their norm. Of integers, values that lie between two
neighbours may fall to the other one, which is then rounded again in each layer behind it."""


class Format(StrEnum):
    """What kind of file is written."""

    ONNX = "onnx"
    ONNX_INT8 = "onnx-int8"
    PT2 = "pt2"


def export(
    model: nn.Module,
    batch: Any,
    path: str | os.PathLike[str],
    format: Format | str = Format.ONNX,
    *,
    round_sums: bool = False,
) -> Path:
    """Write ``model`` as a file that runs without hap_hf, and compare what it computes with the model.

    The file takes the inputs of ``batch`` without its labels, under their names, and returns the logits. The number of
    samples and the lengths of texts may be others than those of the batch; the comparison is made at such a shape.

    Args:
        model: A model, pruned, with implants, quantized or neither; it stays as it is.
        batch: An example of its inputs: a mapping, or a pair of inputs and labels.
        path: The file to write.
        format: ``"onnx"``: floating point; a quantized model's rounding is written as ordinary arithmetic.
            ``"onnx-int8"``: a quantized model's integers, with ``QuantizeLinear`` and ``DequantizeLinear`` around its
            layers (QDQ), which ONNX Runtime and OpenVINO execute as integers. ``"pt2"``: a program of
            ``torch.export``, for ``torch.export.load``.
        round_sums: For ``"onnx-int8"``: also round the outputs of convolutions that are added to something, to 8 bits
            with the ranges that they have on ``batch``. ONNX Runtime convolves in integers only where the output is
            rounded; the file differs from the model by this rounding.

    Returns:
        The path. Of ONNX files, weights of more than 2 GB lie beside it in a file that ends in ``.data``.

    Raises:
        BatchError: If the batch holds anything but tensors of as many samples.
        ConfigError: If the format is unknown, a package for it is missing, or the model is not quantized as it needs.
        ExportError: If torch cannot export the model, or the file computes something else; no file is left.
        UnsupportedModelError: If the model is wrapped, compiled, in half precision or has live adapters.
    """
    kind = member(Format, "format", format)
    target = Path(path)
    _check(model, target, kind, round_sums=round_sums)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        inputs = inputs_of(model, batch)
        source = with_integers(model) if kind is Format.ONNX_INT8 else with_rounded_weights(model)
        _write(Logits(source.eval(), tuple(inputs)), inputs, target, kind, round_sums=round_sums)
        other = fewer(inputs)
        with torch.no_grad():
            expected = Logits(model, tuple(inputs))(*other.values())
        got = _run(target, kind, other)
        distance = float((got - expected.cpu()).norm() / expected.norm().cpu().clamp_min(1e-12))
        if not distance <= _TOLERANCE[kind is Format.ONNX_INT8]:
            target.unlink()
            _beside(target).unlink(missing_ok=True)
            raise ExportError(
                f"the exported file computes something else than the model: at inputs of shape "
                f"{[list(v.shape) for v in other.values()]} its logits differ by {distance:.3g} of their norm, so it "
                "was not kept; export another part of the model, or another format"
            )
        logger.info("%s: logits differ from the model's by %.2g of their norm", target, distance)
    finally:
        for module, flag in training:
            module.training = flag
    return target


def check_installed(kind: Format) -> None:
    """Check that the packages are there that write a kind of file.

    Args:
        kind: The kind.

    Raises:
        ConfigError: If one is missing.
    """
    missing = [name for name in _NEEDED if kind is not Format.PT2 and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'format={kind.value!r} needs {" and ".join(missing)}, not installed: pip install "hap_hf[export]"'
        )


def _check(model: nn.Module, target: Path, kind: Format, *, round_sums: bool) -> None:
    """Check what can be checked before anything is computed."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model, a torch.nn.Module, got a {type(model).__name__}")
    if is_compiled(model) or type(model).__name__ in {"DataParallel", "DistributedDataParallel"}:
        raise UnsupportedModelError(f"got a {type(model).__name__}; export the model inside of it")
    check_no_adapters(model)
    if round_sums and kind is not Format.ONNX_INT8:
        raise ConfigError(f"round_sums=True has a meaning only with format='onnx-int8', got format={kind.value!r}")
    check_installed(kind)
    # Runtimes have no kernels in bfloat16 on a CPU, and compute in float16 in another order.
    halves = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} & {"float16", "bfloat16"}
    if halves and kind is not Format.PT2:
        raise UnsupportedModelError(
            f"expected a model in float32 for format={kind.value!r}, got {' and '.join(sorted(halves))}; call "
            "model.float() first, on a copy if the model is still needed as it is"
        )
    if not target.parent.is_dir():
        raise ConfigError(f"expected a path in a folder that exists, got {str(target)!r}")


def _write(wrapper: Logits, inputs: Mapping[str, Tensor], target: Path, kind: Format, *, round_sums: bool) -> None:
    example, shapes = tuple(inputs.values()), (dynamic_dims(inputs, named=kind is not Format.PT2),)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations, and of names of shared dimensions
            if kind is Format.PT2:
                torch.export.save(torch.export.export(wrapper, example, dynamic_shapes=shapes), target)
                return
            program: Any = torch.onnx.export(
                wrapper,
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=["logits"],
                opset_version=_OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever torch raises on code that it cannot follow
        raise ExportError(
            f"torch could not export this {type(wrapper.model).__name__}: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    onnx: Any = importlib.import_module("onnx")
    proto = program.model_proto
    strip_(proto.graph)
    if kind is Format.ONNX_INT8:
        fold_batch_norms_(proto.graph)
        if round_sums:
            round_sums_(proto, {name: value.cpu().numpy() for name, value in inputs.items()})
    # One file holds 2 GiB at most; beyond that weights lie in another one beside it.
    apart = sum(len(t.raw_data) for t in proto.graph.initializer) > _MOST_BYTES
    _beside(target).unlink(missing_ok=True)  # or it would be appended to
    onnx.save(proto, target, save_as_external_data=apart, location=_beside(target).name)


def _beside(target: Path) -> Path:
    """Return the file for weights that do not fit into a file."""
    return target.with_name(f"{target.name}.data")


def _run(target: Path, kind: Format, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the file computes."""
    if kind is Format.PT2:
        with torch.no_grad():
            found: Tensor = torch.export.load(target).module()(*inputs.values())
        return found.cpu()
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    known = {i.name for i in session.get_inputs()}  # one that nothing depends on is not there
    feeds = {name: value.cpu().numpy() for name, value in inputs.items() if name in known}
    return torch.from_numpy(session.run(None, feeds)[0])
