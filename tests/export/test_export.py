"""Exported files: what they compute at other shapes, in which operators, and what is refused."""

import copy
import sys

import pytest
import torch
from checkpoints import pruned, single
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import hap_hf
from hap_hf import BitConfig, ConfigError, ExportError, UnsupportedModelError, quantize_
from hap_hf.layers.quantized import Quantized

onnx = pytest.importorskip("onnx", reason="the extra [export] is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
pytest.importorskip("onnxscript", reason="the extra [export] is not installed")


def operators(path):
    graph = onnx.load(path).graph
    return [node.op_type for node in graph.node]


def session(path, *, optimized=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits_of(session, batch):
    names = {i.name for i in session.get_inputs()}
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items() if k in names})[0])


def longer(batch):
    """Return inputs of five samples, and texts one and a half times as long."""
    result = {}
    for name, value in batch.items():
        if name != "labels":
            value = torch.cat([value, value.flip(0)])[:5]
            result[name] = torch.cat([value, value[:, :4]], 1) if not value.is_floating_point() else value
    return result


@pytest.fixture(scope="module")
def bert():
    model, batch = pruned("bert")
    return model.eval(), batch


@pytest.fixture(scope="module")
def integers(bert, tmp_path_factory):
    model, batch = copy.deepcopy(bert[0]), bert[1]
    quantize_(model, [batch], BitConfig(weight_bits={"*": 8, "*.1.*": 4}, activation_bits={"*": 8, "*query": 6}))
    path = tmp_path_factory.mktemp("integers") / "model.onnx"
    return model, batch, hap_hf.export(model, batch, path, "onnx-int8")


def test_a_pruned_model_with_implants_computes_the_same_at_other_shapes(bert, tmp_path):
    model, batch = bert
    path = hap_hf.export(model, batch, tmp_path / "model.onnx")
    other = longer(batch)
    with torch.no_grad():
        expected = model(**other).logits
    torch.testing.assert_close(logits_of(session(path), other), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(session(path), batch)[:2], expected[:2], atol=1e-4)


def test_integers_compute_what_the_quantized_model_does(integers, tmp_path):
    model, batch, path = integers
    other = longer(batch)
    with torch.no_grad():
        expected = model(**other).logits
    torch.testing.assert_close(logits_of(session(path), other), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, Quantized) for m in model.modules())  # the model itself is as it was
    kinds = operators(path)
    layers = sum(isinstance(m, Quantized) for m in model.modules())
    assert kinds.count("QuantizeLinear") >= layers - 3
    assert kinds.count("DequantizeLinear") > 2 * layers - 6
    codes = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    weights = [p for n, p in model.named_parameters() if p.dim() == 2]
    assert len(codes) == len(weights)
    # And runtimes multiply integers.
    fast = session(path, optimized=tmp_path / "fast.onnx")
    found = logits_of(fast, other)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert {"MatMulIntegerToFloat", "QLinearMatMul"} & set(operators(tmp_path / "fast.onnx"))


@pytest.mark.parametrize("family", ["vit", "llama", "t5"])
def test_families_come_back_bit_for_bit_and_compute_the_same_as_integers(family, tmp_path):
    model, batch = pruned(family)
    quantize_(model.eval(), [batch], BitConfig())
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    hap_hf.export(model, batch, tmp_path / "model.onnx", "onnx-int8")
    inputs = longer(batch)
    if family == "t5":  # the file takes what the model makes of the labels
        labels = torch.cat([batch["labels"], batch["labels"].flip(0)])[:5]
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        rounded = [m for m in again.modules() if isinstance(m, Quantized)]
        assert rounded
        for m in rounded:
            m.get_parameter("weight" if hasattr(m, "weight") else "down.weight").mul_(1.5)
        assert not torch.allclose(again(**inputs).logits, expected, atol=1e-3)
    found = logits_of(session(tmp_path / "model.onnx"), inputs)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_openvino_reads_the_same_file(integers):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model, batch, path = integers
    other = longer(batch)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [i.get_any_name() for i in compiled.inputs]
    found = torch.from_numpy(compiled({name: other[name].numpy() for name in names})[0])
    with torch.no_grad():
        expected = model(**other).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("rounding", ["asymmetric", "per_token"])
def test_rounding_as_ordinary_arithmetic(rounding, tmp_path):
    model, batch = pruned("vit")
    quantize_(model, [batch], BitConfig(weight_bits=4, activations=rounding))
    kind = "onnx" if rounding == "per_token" else "pt2"
    path = hap_hf.export(model.eval(), batch, tmp_path / "model", kind)
    x = {"pixel_values": torch.randn(5, 3, 8, 8)}
    with torch.no_grad():
        expected = model(**x).logits
    found = logits_of(session(path), x) if kind == "onnx" else torch.export.load(path).module()(*x.values())
    assert (found - expected).norm() < 1e-3 * expected.norm()
    if kind == "onnx":
        assert "QuantizeLinear" not in operators(path)


def test_a_model_of_images_is_exported_after_a_training(tmp_path):
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3)).eval()
    model.config.use_cache = False  # the Trainer writes it into every config, also of models that have no cache
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    path = hap_hf.export(model, batch, tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(session(path), batch), model(**batch).logits, rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.norm_b(self.b(self.norm_a(self.a(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


def test_batch_norms_are_folded_into_integers_and_sums_are_rounded_on_request(tmp_path):
    torch.manual_seed(0)
    model = Residual()
    for norm in (model.norm, model.norm_a, model.norm_b):
        nn.init.normal_(norm.weight)  # of either sign
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        model.norm_a.weight[2] = 0
    x = torch.randn(8, 3, 10, 10)
    quantize_(model.eval(), [(x, torch.zeros(8))])
    with torch.no_grad():
        expected = model(x)
    plain = hap_hf.export(model, {"x": x}, tmp_path / "plain.onnx", "onnx-int8")
    assert "BatchNormalization" not in operators(plain)
    assert operators(plain).count("Conv") == 3
    torch.testing.assert_close(logits_of(session(plain), {"x": x}), expected, rtol=1e-3, atol=1e-3)
    rounded = hap_hf.export(model, {"x": x}, tmp_path / "rounded.onnx", "onnx-int8", round_sums=True)
    found = logits_of(session(rounded, optimized=tmp_path / "fast.onnx"), {"x": x})
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    assert operators(tmp_path / "fast.onnx").count("QLinearConv") == 3


def test_weights_that_do_not_fit_into_a_file_lie_beside_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 3, 10, 10)
    whole = hap_hf.export(model, {"x": x}, tmp_path / "whole.onnx")
    export = sys.modules["hap_hf.export.export"]
    monkeypatch.setattr(export, "_MOST_BYTES", 0)
    for _ in range(2):
        apart = hap_hf.export(model, {"x": x}, tmp_path / "apart.onnx")
        weights = tmp_path / "apart.onnx.data"
        assert weights.stat().st_size < 2 * whole.stat().st_size  # not appended to the earlier one
    assert not (tmp_path / "whole.onnx.data").exists()
    assert apart.stat().st_size < whole.stat().st_size
    assert torch.equal(logits_of(session(apart), {"x": x}), logits_of(session(whole), {"x": x}))
    monkeypatch.setattr(export, "_TOLERANCE", {False: -1.0})
    with pytest.raises(ExportError, match="computes something else"):
        hap_hf.export(model, {"x": x}, apart)
    assert not apart.exists()
    assert not weights.exists()


def test_what_cannot_be_exported_is_refused_and_no_file_is_left(bert, tmp_path, monkeypatch):
    model, batch = bert
    target = tmp_path / "model.onnx"
    tokens = copy.deepcopy(model)
    quantize_(tokens, [batch], BitConfig(activations="per_token"))
    for subject, given, path, kind, options, error, words in (
        (model, batch, target, "tflite", {}, ConfigError, "format must be one of"),
        (model, batch, target, "onnx-int8", {}, ConfigError, "call hap_hf.quantize_"),
        (tokens, batch, target, "onnx-int8", {}, ConfigError, "known beforehand"),
        (model, batch, target, "onnx", {"round_sums": True}, ConfigError, "has a meaning only"),
        (model, batch, tmp_path / "no" / "x.onnx", "onnx", {}, ConfigError, "a folder that exists"),
        (object(), batch, target, "onnx", {}, UnsupportedModelError, "expected a model"),
        (nn.DataParallel(model), batch, target, "onnx", {}, UnsupportedModelError, "inside of it"),
        (copy.deepcopy(model).bfloat16(), batch, target, "onnx", {}, UnsupportedModelError, "float32 .* got bfloat16"),
        (model, "text", target, "onnx", {}, hap_hf.BatchError, "got the string"),
        (model, {**batch, "extra": torch.ones(7)}, target, "onnx", {}, hap_hf.BatchError, "tensor of 3 samples"),
    ):
        with pytest.raises(error, match=words):
            hap_hf.export(subject, given, path, kind, **options)

    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) if x.sum().item() > 0 else -x

    class Length(Data):
        def forward(self, x):
            return self.layer(x) * float(torch.tensor(x.shape[0] == 2))

    with pytest.raises(ExportError, match="could not export this Data"):
        hap_hf.export(Data(), {"x": torch.ones(2, 2)}, target, "pt2")
    with pytest.raises(ExportError):
        hap_hf.export(Length(), {"x": torch.ones(2, 2)}, target, "pt2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "hap_hf\[export\]"'):
        hap_hf.export(model, batch, target)
    assert not list(tmp_path.iterdir())
    assert not model.training
    assert single("bert")[0] is not None
