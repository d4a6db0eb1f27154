"""What people hand in by mistake as batches, losses and models: each is told what to do instead, and nothing changes.

That ``import hap_hf`` is missing is in ``tests/checkpoint/test_checkpoint.py``, live adapters in
``tests/trainer/test_peft.py``, a model pruned between two trainings in ``tests/trainer/test_stale_optimizer.py``.
"""

import pytest
import torch
import transformers as hf
from decisions import assert_same_state
from torch import nn
from torch.utils.data import DataLoader
from trainings import samples, tiny_bert

from hap_hf import (
    BatchError,
    ConfigError,
    CurvatureError,
    HapConfig,
    StaleOptimizerError,
    UnsupportedModelError,
    find_groups,
    plan_of,
    prune,
    save_pruned,
)

pytestmark = pytest.mark.fast

QUICK = HapConfig(target_params=0.7, method="magnitude", progress=False)
SCORED = HapConfig(target_params=0.7, method="taylor", progress=False)


def batches():
    return [hf.default_data_collator(samples()[8 * i : 8 * i + 8]) for i in range(2)]


def changed(change):
    return [{k: change(k, v) for k, v in batch.items()} for batch in batches()]


def mean_of(logits, labels):
    return nn.functional.cross_entropy(logits, labels)


BATCHES = {
    "a dataset": (samples, BatchError, r"looks like one sample of a dataset; let a loader make batches: .*DataLoader"),
    "one batch": (lambda: batches()[0], BatchError, "expected several batches, got one .* put it in a list"),
    "NumPy": (lambda: changed(lambda _, v: v.numpy()), BatchError, "let a collator make tensors of it, for example"),
    "lists": (lambda: changed(lambda _, v: v.tolist()), BatchError, "let a collator make tensors of it, for example"),
    "triples": (
        lambda: [tuple(b.values()) for b in batches()],
        BatchError,
        r"got a tuple of 3 .* pass mappings .* pairs \(inputs, labels\), or loss_fn=",
    ),
    "label": (
        lambda: [{k.replace("labels", "label"): v for k, v in b.items()} for b in batches()],
        BatchError,
        "is 'label' meant. Call it 'labels'",
    ),
    "nothing": (list, BatchError, "expected at least one batch, got none.* pass a list of batches"),
    "the meta device": (
        lambda: changed(lambda _, v: v.to("meta")),
        BatchError,
        "on the meta device and has no values; make it on the CPU",
    ),
    "labels as floats": (
        lambda: changed(lambda k, v: v.float() if k == "labels" else v),
        BatchError,
        "BertForSequenceClassification does not run .* labels .8. float32: .* pass batches like those",
    ),
    "labels out of range": (
        lambda: changed(lambda k, v: v + 5 if k == "labels" else v),
        BatchError,
        "Target 5 is out of bounds.*pass batches like those",
    ),
    "labels as int32": (
        lambda: changed(lambda k, v: v.int() if k == "labels" else v),
        BatchError,
        "labels .8. int32: .* Long",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_none_are_answered_with_what_to_pass(name):
    make, error, message = BATCHES[name]
    model = tiny_bert()
    with pytest.raises(error, match=message):
        prune(model, make(), SCORED)
    assert_same_state(model, tiny_bert())


LOSSES = {
    "a class of torch": (
        nn.CrossEntropyLoss(),
        ConfigError,
        "with the model and a batch, got a CrossEntropyLoss",
    ),
    "outputs and labels": (
        mean_of,
        (BatchError, CurvatureError),
        r"as in loss_fn=lambda model, batch: model\(",
    ),
    "all outputs": (lambda m, b: m(**b), CurvatureError, r"got SequenceClassifierOutput; return its loss, as in"),
    "a loss a sample": (
        lambda m, b: nn.functional.cross_entropy(m(**b).logits, b["labels"], reduction="none"),
        CurvatureError,
        r"got shape \[8\]; return its mean",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_none_are_answered_with_how_to_write_one(name):
    loss_fn, error, message = LOSSES[name]
    with pytest.raises(error, match=message):
        prune(tiny_bert(), batches(), SCORED, loss_fn=loss_fn)


MODELS = {
    "a name": (lambda: "bert-base-uncased", UnsupportedModelError, "expected a model, a torch.nn.Module, got a str"),
    "model and batches swapped": (batches, UnsupportedModelError, "expected a model, a torch.nn.Module, got a list"),
    "no head": (lambda: tiny_bert().bert, BatchError, "use the class with the task's head, such as AutoModelFor"),
    "the meta device": (lambda: tiny_bert().to("meta"), UnsupportedModelError, "load the weights first"),
    "DataParallel": (lambda: nn.DataParallel(tiny_bert()), UnsupportedModelError, "prune the model inside it"),
    "compiled": (lambda: torch.compile(tiny_bert()), UnsupportedModelError, "prune the original, then call torch.comp"),
    "NaN weights": (
        lambda: filled(tiny_bert(), float("nan")),
        CurvatureError,
        "got nan; look for extreme",
    ),
}


def filled(model, value):
    nn.init.constant_(model.classifier.weight, value)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_none_are_answered_with_what_to_prune(name):
    make, error, message = MODELS[name]
    with pytest.raises(error, match=message):
        prune(make(), batches(), SCORED)


def test_an_optimizer_that_is_older_than_the_cut_says_so_at_its_next_step():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    prune(model, batches(), QUICK)
    model(**batches()[0]).loss.backward()
    with pytest.raises(StaleOptimizerError, match=r"make the optimizer, .* after pruning, or pass it along"):
        optimizer.step()
    with pytest.raises(ConfigError, match=r"optimizer must be the torch.optim.Optimizer of the model, got a str"):
        prune(tiny_bert(), batches(), QUICK, optimizer="adamw")


def test_a_second_model_of_one_config_is_saved_as_the_dense_model_that_it_is(tmp_path):
    config = tiny_bert().config
    first, second = (hf.BertForSequenceClassification(config) for _ in range(2))
    prune(first, batches(), QUICK)
    assert plan_of(second) is None
    second.save_pretrained(tmp_path)
    assert_same_state(hf.BertForSequenceClassification.from_pretrained(tmp_path), second.eval())
    assert plan_of(first) is not None


def test_what_cannot_be_saved_as_a_stock_checkpoint_says_how_to_prune_for_it(tmp_path):
    with pytest.raises(ConfigError, match=r"so it was not pruned by hap_hf; call model\.save_pretrained"):
        save_pruned(tiny_bert(), tmp_path)
    model = tiny_bert()
    prune(model, batches(), HapConfig(target_params=0.7, implant_ratio=0.5, method="magnitude", progress=False))
    with pytest.raises(ConfigError, match=r"cannot hold implants.* prune with implant_ratio=0, or save with"):
        save_pruned(model, tmp_path, vanilla=True)
    model = tiny_bert()
    prune(model, batches(), HapConfig(target_params=0.63, kinds="ffn", method="magnitude", progress=False))
    advice = r"prune with HapConfig\(\.\.\., equal_widths=True\), or save with vanilla=False"
    with pytest.raises(ConfigError, match=f"intermediate_size is one number for all layers.*{advice}"):
        save_pruned(model, tmp_path, vanilla=True)
    # What it says to do does it.
    even = HapConfig(target_params=0.63, kinds="ffn", equal_widths=True, method="magnitude", progress=False)
    model = tiny_bert()
    prune(model, batches(), even)
    save_pruned(model, tmp_path, vanilla=True)
    assert "hap_hf" not in (tmp_path / "config.json").read_text()


def test_what_is_no_mistake_works():
    loader = DataLoader([(x["input_ids"], x["labels"]) for x in samples()], batch_size=8)
    for given in (iter(batches()), loader, [hf.BatchEncoding(b) for b in batches()], batches()[:1]):
        model = tiny_bert()
        for parameter in model.bert.embeddings.parameters():
            parameter.requires_grad_(False)
        prune(model, given, {"target_params": 0.7, "method": "magnitude", "progress": False})
        assert model.num_parameters() < tiny_bert().num_parameters()
    with pytest.raises(BatchError, match=r"got a list of 2 .*pass mappings"):
        find_groups(tiny_bert(), batches())
