"""Batch norms behind convolutions in an ONNX graph: folded into scales and biases, which integers leave exact."""

import copy
import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np


def fold_batch_norms_(graph: Any) -> int:
    """Fold each batch norm that alone reads a convolution with integer weights, in place.

    With ``c = gamma / sqrt(variance + eps)`` the weight of a channel becomes ``c w``, which is ``s q`` with the scale
    ``|c| s`` and the integers ``sign(c) q``: rounding commutes with it, as the grid is symmetric. The bias becomes
    ``beta + c (b - mean)``. A runtime that knows how to convolve integers knows no batch norm behind them.

    Args:
        graph: The graph of an ONNX model (a protobuf message).

    Returns:
        How many were folded.
    """
    numpy_helper: Any = importlib.import_module("onnx.numpy_helper")
    constants = {t.name: t for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    folded = []
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = makers.get(norm.input[0])
        weight = None if conv is None or conv.op_type != "Conv" else makers.get(conv.input[1])
        if conv is None or weight is None or weight.op_type != "DequantizeLinear" or readers[conv.output[0]] > 1:
            continue
        names = [*norm.input[1:5], *weight.input[:2], *conv.input[2:3]]
        # A scale that others read too would change for them.
        if not set(names) <= constants.keys() or any(readers[name] > 1 for name in weight.input[:2]):
            continue
        gamma, beta, mean, variance, codes, scales, *bias = (numpy_helper.to_array(constants[n]) for n in names)
        eps = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance.astype(np.float64) + eps)
        shape = (-1, *[1] * (codes.ndim - 1))
        signs = np.where(factor < 0, -1, 1).astype(np.int8).reshape(shape)
        # A channel that the norm silences would have the scale 0, which the operator does not take.
        dead = np.abs(factor) * scales < np.finfo(np.float32).tiny
        new_codes = np.where(dead.reshape(shape), np.int8(0), codes * signs)
        new_scales = np.where(dead, 1.0, np.abs(factor) * scales).astype(np.float32)
        new_bias = (beta + factor * ((bias[0] if bias else 0.0) - mean)).astype(np.float32)
        constants[weight.input[0]].CopyFrom(numpy_helper.from_array(new_codes, weight.input[0]))
        constants[weight.input[1]].CopyFrom(numpy_helper.from_array(new_scales, weight.input[1]))
        name = f"{conv.output[0]}_folded_bias"
        graph.initializer.append(numpy_helper.from_array(new_bias, name))
        del conv.input[2:]
        conv.input.append(name)
        conv.output[0] = norm.output[0]
        folded.append(norm)
    for norm in folded:
        graph.node.remove(norm)
    _drop_unused_(graph)
    return len(folded)


def _drop_unused_(graph: Any) -> None:
    """Remove constants that nothing reads any more."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for constant in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(constant)


def strip_(graph: Any) -> None:
    """Remove what exporters note beside each node, such as stack traces: of a small model that is half of the file."""
    for entry in [*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output]:
        del entry.metadata_props[:]
        entry.doc_string = ""
    del graph.value_info[:]


def round_sums_(model: Any, inputs: Mapping[str, Any]) -> int:
    """Round the outputs of convolutions that are added to something, in place.

    Args:
        model: An ONNX model (a protobuf message) whose convolutions have integer weights.
        inputs: Values of its inputs by name, from which the ranges are taken.

    Returns:
        How many outputs are rounded.
    """
    onnx, numpy_helper = importlib.import_module("onnx"), importlib.import_module("onnx.numpy_helper")
    helper: Any = importlib.import_module("onnx.helper")
    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sums = [
        conv.output[0]
        for conv in graph.node
        if conv.op_type == "Conv" and any(n.op_type == "Add" for n in readers.get(conv.output[0], ()))
    ]
    # What is added to them is rounded too, where it is rounded anyway: the same integers then serve both readers.
    watched = copy.deepcopy(model)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sums)
    for name, values in zip(sums, _values(watched, sums, inputs), strict=True):
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        scale = np.float32(max((high - low) / 255, 1e-18))
        zero_point = np.uint8(np.clip(np.round(-low / scale), 0, 255))
        for suffix, value in (("scale", scale), ("zero_point", zero_point)):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}_{suffix}"))
        grid = [f"{name}_scale", f"{name}_zero_point"]
        maker = next(n for n in graph.node if name in n.output)
        maker.output[0] = f"{name}_exact"
        position = list(graph.node).index(maker) + 1
        graph.node.insert(position, helper.make_node("QuantizeLinear", [f"{name}_exact", *grid], [f"{name}_codes"]))
        graph.node.insert(position + 1, helper.make_node("DequantizeLinear", [f"{name}_codes", *grid], [name]))
    _share_rounded_(graph)
    return len(sums)


def _share_rounded_(graph: Any) -> None:
    """Let an addition read the rounded values of what it adds, where a layer rounds them."""
    rounded: dict[str, str] = {}
    made_by = {output: (i, node) for i, node in enumerate(graph.node) for output in node.output}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in made_by:
            rounded.setdefault(made_by[node.input[0]][1].input[0], node.output[0])
    for position, node in enumerate(graph.node):
        for i, name in enumerate(node.input if node.op_type == "Add" else ()):
            if name in rounded and made_by[rounded[name]][0] < position:
                node.input[i] = rounded[name]


def _values(model: Any, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    known = {i.name for i in session.get_inputs()}
    values: list[Any] = session.run(names, {name: value for name, value in inputs.items() if name in known})
    return values
