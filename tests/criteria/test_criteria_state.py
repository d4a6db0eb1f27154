"""Scoring by gradients of samples: the model is left as found, and nothing that should not matter does."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scored_models import BATCH, FFN, bert, config, heads, net, score, snapshot, text_batch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForQuestionAnswering, BertForTokenClassification, GPT2Config, GPT2LMHeadModel

from hap_hf.config import HapConfig
from hap_hf.criteria import GGN, Coupling, GGNQuadratic, HessianSplit, MaskGGN, criterion_of
from hap_hf.curvature import sample_means
from hap_hf.errors import BatchError, ConfigError, CurvatureError, UnsupportedModelError
from hap_hf.names.group import Group, Kind, Role, Slice

OF_SAMPLES = ["ggn", "ggn_quadratic", "empirical_fisher", "taylor", "mask_fisher", "michel"]
HALF = {"x": BATCH["x"].float(), "labels": BATCH["labels"]}


@pytest.fixture
def _no_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that no sample is differentiated alone but to check the others."""
    monkeypatch.setattr(sample_means.SampleMeans, "_one_by_one", None)


def labelled() -> dict[str, Tensor]:
    """Return a batch with labels."""
    return text_batch(labels=torch.tensor([0, 1, 1]))


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return each sample as a batch."""
    return [{k: v[n : n + 1] for k, v in batch.items()} for n in range(len(batch["labels"]))]


def scored(method: str, model: nn.Module, group: Group, batches: Any, **settings: Any) -> Tensor:
    """Return the sensitivities of one group."""
    loss_fn = settings.pop("loss_fn", None)
    return score(model, [group], batches, config(method=method, **settings), loss_fn=loss_fn).sensitivity[group.name]


def exact(method: str) -> dict[str, Any]:
    """Return the settings with which a method takes every output; those by gradients of labels have none."""
    return {"num_output_probes": None} if "ggn" in method else {}


@pytest.mark.parametrize("method", ["ggn", "mask_fisher"])
@pytest.mark.parametrize("ending", [None, ValueError("loss failed"), KeyboardInterrupt()], ids=repr)
def test_the_model_is_left_as_found_however_scoring_ends(method: str, ending: BaseException | None) -> None:
    model = bert().train()
    model.bert.embeddings.eval()
    model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = snapshot(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]

    calls: list[int] = []

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        torch.rand(1)
        assert not model.training
        value = model(**batch).loss
        calls.append(len(batch["labels"]))
        if ending is not None and calls.count(1) == 7:  # while samples are checked alone, after a look at the loss
            raise ending
        return value

    if ending is None:
        scored(method, model, heads(0), [labelled()] * 2, loss_fn=loss)
    else:
        with pytest.raises(type(ending)):
            scored(method, model, heads(0), [labelled()] * 2, loss_fn=loss)
    assert snapshot(model) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("method", OF_SAMPLES)
def test_frozen_weights_dropout_and_checkpointing_do_not_matter(method: str) -> None:
    plain, other = bert(), bert().requires_grad_(False).train()
    for module in other.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    first, second = (scored(method, m, heads(0), [labelled()]) for m in (plain, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", [*OF_SAMPLES, "mask_ggn"])
def test_fused_attention_stays_on(method: str) -> None:
    allowed: set[bool] = set()

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        allowed.add(torch.backends.cuda.flash_sdp_enabled())
        return model(**batch).loss

    scored(method, net(), FFN, [BATCH], loss_fn=loss)
    assert allowed == {True}


@pytest.mark.usefixtures("_no_sample_alone")
@pytest.mark.parametrize("method", OF_SAMPLES)
def test_splitting_a_batch_with_padded_token_labels_changes_nothing(method: str) -> None:
    model = bert(BertForTokenClassification)  # two classes, for which a single sign is exact but between tokens
    labels = torch.randint(0, 2, (3, 7))
    labels[1, 4:] = labels[2, 1:] = -100
    batch = text_batch(labels=labels)
    whole, split = (scored(method, model, heads(0), b, **exact(method)) for b in ([batch], rows_of(batch)))
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_no_sample_alone")
@pytest.mark.parametrize("method", OF_SAMPLES)
def test_splitting_a_batch_of_next_token_labels_changes_nothing(method: str) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 8, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, bos_token_id=1, eos_token_id=1, **sizes)).double()
    prefix = "transformer.h.0.attn"
    group = Group(
        "heads",
        Kind.HEADS,
        4,
        (
            *(Slice(f"{prefix}.c_attn.weight", (16, 48), 1, 16 * i, 4, Role.PRODUCER) for i in range(3)),
            Slice(f"{prefix}.c_proj.weight", (16, 16), 0, 0, 4, Role.CONSUMER),
        ),
    )
    batch = text_batch()
    batch["input_ids"] %= 9
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    whole, split = (scored(method, model, group, b, **exact(method)) for b in ([batch], rows_of(batch)))
    # transformers computes this loss in float32, whatever the model's dtype
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("_no_sample_alone")
def test_answers_of_two_outputs_are_scored() -> None:
    model = bert(BertForQuestionAnswering)
    spans = {"start_positions": torch.tensor([0, 3, 2]), "end_positions": torch.tensor([1, 6, 2])}
    batch = text_batch(**spans)
    whole = scored("ggn", model, heads(0), [batch], num_output_probes=None)
    rows = [{k: v[n : n + 1] for k, v in batch.items()} for n in range(3)]
    split = scored("ggn", model, heads(0), rows, num_output_probes=None)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)
    assert (whole > 0).all()


@pytest.mark.usefixtures("_no_sample_alone")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.1), ("fp16", 1e-2)])
@pytest.mark.parametrize("method", OF_SAMPLES)
def test_autocast_agrees_with_float64_to_the_precision_of_its_dtype(
    method: str, precision: str, tolerance: float
) -> None:
    truth = scored(method, net(), FFN, [BATCH])
    found = scored(method, net().float(), FFN, [HALF], precision=precision)
    assert (found - truth).norm() < tolerance * truth.norm()
    assert precision == "fp32" or (found - truth).norm() > 1e-6 * truth.norm()


@pytest.mark.usefixtures("_no_sample_alone")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 1e-2)])
@pytest.mark.parametrize("method", OF_SAMPLES)
def test_models_stored_in_half_precision_are_scored(method: str, dtype: torch.dtype, tolerance: float) -> None:
    truth = scored(method, net(), FFN, [BATCH])
    found = scored(method, net().to(dtype), FFN, [{**BATCH, "x": BATCH["x"].to(dtype)}])
    assert (found - truth).norm() < tolerance * truth.norm()


def test_tiny_gradients_survive_float16() -> None:
    def tiny(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return 2.0**-22 * model(**batch).loss

    truth = scored("mask_fisher", net(), FFN, [BATCH], loss_fn=tiny)
    found = scored("mask_fisher", net().float(), FFN, [HALF], loss_fn=tiny, precision="fp16")
    assert (found - truth).norm() < 1e-2 * truth.norm()


def test_the_callers_autocast_does_not_reach_in() -> None:
    plain = scored("ggn", net().float(), FFN, [HALF])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scored("ggn", net().float(), FFN, [HALF])
    assert torch.equal(inside, plain)


def test_signs_depend_on_the_seed_alone() -> None:
    group, batch = heads(0), text_batch(labels=torch.tensor([0, 2, 1]))
    model = bert(num_labels=3)
    first, again, other = (scored("ggn", model, group, [batch], seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_signs_come_nearer_to_the_exact_trace() -> None:
    group, batch = heads(0), text_batch(labels=torch.tensor([0, 2, 1]))
    model = bert(num_labels=3)
    exact, few, many = (scored("ggn", model, group, [batch], num_output_probes=n) for n in (None, 1, 64))
    assert (many - exact).norm() < 0.5 * (few - exact).norm()


@pytest.mark.parametrize("method", OF_SAMPLES)
def test_scores_say_how_they_were_made(method: str) -> None:
    probes = {"num_output_probes": 2} if "ggn" in method else {}
    scores = score(net(), [FFN], [BATCH] * 3, config(method=method, max_batches=2, **probes))
    assert (scores.method, scores.num_batches, scores.num_loss_terms) == (method, 2, 12)
    assert scores.num_probes == (2 if "ggn" in method else 0)
    error = scores.standard_error["net:ffn"]
    assert error.dtype is scores.sensitivity["net:ffn"].dtype is torch.float64
    assert (error > 0).all()
    assert torch.isfinite(error).all()


@pytest.mark.parametrize("method", sorted(set(OF_SAMPLES) - {"michel"}))  # whose norm is taken as known
def test_standard_errors_cover_the_scores_of_other_samples(method: str) -> None:
    # 400 samples in 20 parts: the spread of their scores is what the standard error of one part announces.
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 3, dtype=torch.float64, generator=generator), torch.arange(400) % 2
    results = [
        score(net(), [FFN], [{"x": a, "labels": b}], config(method=method))
        for a, b in zip(x.split(20), y.split(20), strict=True)
    ]
    spread = torch.stack([r.sensitivity["net:ffn"] for r in results]).std(0)
    announced = torch.stack([r.standard_error["net:ffn"] for r in results]).square().mean(0).sqrt()
    low = 0.3 if method == "taylor" else 0.6  # an absolute value folds the spread at zero
    assert (spread / announced > low).all()
    assert (spread / announced < 1.6).all()


def test_the_progress_bar_counts_batches(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # in a pipe there is none
    scored("mask_fisher", net(), FFN, [BATCH] * 5, max_batches=2, progress=True)
    assert "mask_fisher: 100%" in (error := capfd.readouterr().err)
    assert "2/2" in error


@pytest.mark.parametrize("method", ["mask_fisher", "michel"])
def test_a_mask_needs_a_consumer(method: str) -> None:
    group = Group("rows", Kind.FFN, 4, FFN.slices[:2])
    with pytest.raises(UnsupportedModelError, match="rows has no weight matrix that is a consumer"):
        scored(method, net(), group, [BATCH])


def test_the_papers_coupling_needs_a_producer() -> None:
    group = Group("columns", Kind.FFN, 4, FFN.slices[2:])
    with pytest.raises(UnsupportedModelError, match="columns has no weight matrix that is a factor or producer"):
        scored("ggn", net(), group, [BATCH], coupling="filter")


def test_consumers_do_not_matter_to_the_papers_coupling() -> None:
    rows = Group("rows", Kind.FFN, 4, FFN.slices[:2])
    for method in ("ggn", "empirical_fisher", "magnitude", "hessian"):
        with_columns = scored(method, net(), FFN, [BATCH], coupling="filter")
        assert torch.equal(with_columns, scored(method, net(), rows, [BATCH]))


def test_a_loss_that_ggn_cannot_take_is_an_error_that_names_another_method() -> None:
    def contrastive(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = model(**batch).logits
        return F.cross_entropy(logits @ logits.T, torch.arange(6))

    with pytest.raises(UnsupportedModelError, match="use method='mask_fisher', which takes"):
        scored("ggn", net(), FFN, [BATCH], loss_fn=contrastive)


def test_bad_batches_are_the_same_errors_as_for_the_hessian() -> None:
    with pytest.raises(BatchError, match=r"batch 1: expected a mapping or a pair of tensors, got a tuple of 3 \("):
        scored("ggn", net(), FFN, [BATCH, (BATCH["x"], BATCH["labels"], BATCH["labels"])])
    with pytest.raises(BatchError, match="returned no loss for a batch"):
        scored("ggn", net(), FFN, [{"x": BATCH["x"], "label": BATCH["labels"]}])
    with pytest.raises(CurvatureError, match="batch 1: expected a finite loss, got nan"):
        scored("ggn", net(), FFN, [BATCH, {**BATCH, "x": BATCH["x"] * float("nan")}])


def test_settings_are_checked_and_survive_json() -> None:
    settings = HapConfig(prune_ratio=0.5, method=GGN(coupling="filter", num_output_probes=None))
    assert settings.criterion == GGN(coupling=Coupling.FILTER, num_output_probes=None)
    assert isinstance(settings.criterion.coupling, Coupling)
    assert HapConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ConfigError, match=r"coupling must be one of \['joint', 'sum', 'filter'\], got 'all'"):
        GGN(coupling="all")
    for criterion in (MaskGGN, GGN, GGNQuadratic, HessianSplit):
        with pytest.raises(ConfigError, match="num_output_probes must be an integer of at least 1, got 0"):
            criterion(num_output_probes=0)


@pytest.mark.parametrize("method", sorted({*OF_SAMPLES, "mask_ggn"} - {"ggn", "empirical_fisher"}))
def test_a_setting_that_the_method_would_not_read_is_an_error(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} has no setting coupling; it has "):
        criterion_of({"name": method, "coupling": "sum"})
    with pytest.raises(ConfigError, match=r"no setting 'coupling': it belongs to a criterion, write .*method=GGN\(c"):
        config(method=method, coupling="sum")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("hesian", r"method must be one of \[.*'hessian'.*\] or a Criterion, got 'hesian'.*did you mean 'hessian'"),
        (GGN, r"method must be an object, got the class GGN; write method=GGN\(\)"),
        (3, r"method must be one of \[.*\] or a Criterion, got 3"),
        ({"name": "ggn", "probes": 3}, r"ggn has no setting probes; it has \['coupling', 'num_output_probes'\]"),
    ],
    ids=["misspelt", "class", "number", "setting"],
)
def test_a_method_that_there_is_not_is_an_error(method: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HapConfig(prune_ratio=0.5, method=method)
