"""Distillation: gradients of the written-out loss, whatever the Trainer's loss is and however steps are made up."""

import copy

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from trainings import Net, assert_same, config, exact_model, make_trainer, samples
from transformers import Trainer

from hap_hf import ConfigError, Distill, HessianPruner, UnsupportedModelError

T = 3.0


class Gradients(hf.TrainerCallback):
    """Keeps the gradients of the first step, and the weights that they belong to."""

    def __init__(self):
        self.first = self.model = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = copy.deepcopy(model).train()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_step(tmp_path, model, distill, **settings):
    """Return what the first step's gradients are and should be taken from: gradients, model and batches."""
    seen, batches = Gradients(), []
    collate = settings.pop("data_collator", hf.default_data_collator)

    def collator(features):
        batches.append(collate(features))
        return batches[-1]

    settings = {"max_steps": 1, "max_grad_norm": 0.0, "data_collator": collator, **settings}
    make_trainer(tmp_path, model, distill, seen, **settings).train()
    return seen, batches


def assert_gradients(seen, loss, *, rough=False):
    """Check the Trainer's gradients against those of a loss of the model as it was; some are computed in float32."""
    own = {n: p for n, p in seen.model.named_parameters() if p.requires_grad}
    expected = dict(zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True))
    assert seen.first
    for name, gradient in seen.first.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4 if rough else 1e-6, atol=1e-7 if rough else 1e-9)


def softened(student, teacher, temperature=T):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


def teacher_like(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7), dtype=p.dtype))
    return other


def without_labels(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def weighted_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") * 2 / num_items_in_batch


class OwnLoss(Trainer):
    """Takes the labels out of the batch, as many do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 4.0]).double())
        return (loss, outputs) if return_outputs else loss


def smoothed(z, labels):
    return F.cross_entropy(z, labels, label_smoothing=0.1)


LOSSES = {
    "the model's own": ({}, F.cross_entropy),
    "label smoothing": ({"label_smoothing_factor": 0.1}, smoothed),
    "compute_loss_func": ({"compute_loss_func": weighted_loss}, lambda z, y: 2 * F.cross_entropy(z, y)),
    "compute_loss": (
        {"kind": OwnLoss},
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 4.0]).double()),
    ),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, F.cross_entropy),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_written_out_loss(tmp_path, name):
    settings, task = LOSSES[name]
    model = exact_model()
    teacher = teacher_like(model)
    before = copy.deepcopy(teacher.state_dict())
    seen, batches = first_step(tmp_path, model, Distill(teacher, alpha=0.3, temperature=T), **settings)
    z = seen.model(**without_labels(batches[0])).logits
    t = teacher.eval()(**without_labels(batches[0])).logits.detach()
    assert_gradients(seen, 0.7 * task(z, batches[0]["labels"]) + 0.3 * softened(z, t).mean())
    with pytest.raises(AssertionError):  # the task's loss alone
        assert_gradients(seen, task(z := seen.model(**without_labels(batches[0])).logits, batches[0]["labels"]))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def causal_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=16)).double()


def seq2seq_model():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 2, "d_ff": 24, "num_layers": 1, "vocab_size": 40}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0)
    ).double()


def texts_with_ignored_labels():
    data = [{**s, "labels": s["input_ids"].clone()} for s in samples()]
    for i, s in enumerate(data):
        s["labels"][: 1 + i % 4] = -100
    return data


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("build", [causal_model, seq2seq_model])
def test_tokens_count_alike_in_whatever_batch_they_are(tmp_path, build, accumulated):
    model = build()
    teacher = teacher_like(model)
    settings = {"data": texts_with_ignored_labels(), "gradient_accumulation_steps": accumulated}
    if build is seq2seq_model:
        settings |= {"kind": hf.Seq2SeqTrainer, "arguments_kind": hf.Seq2SeqTrainingArguments}
    distill = Distill(teacher, alpha=0.4, temperature=T)
    seen, batches = first_step(tmp_path, model, distill, per_device_train_batch_size=4, **settings)
    task, terms, count = 0, 0, 0
    for batch in batches[:accumulated]:
        z, t = seen.model(**batch).logits, teacher.eval()(**batch).logits.detach()
        labels = batch["labels"]
        if build is causal_model:
            z, t, labels = z[:, :-1], t[:, :-1], labels[:, 1:]
        counted = labels != -100
        task = task + F.cross_entropy(z[counted], labels[counted], reduction="sum")
        terms, count = terms + softened(z, t)[counted].sum(), count + counted.sum()
    if build is seq2seq_model:  # which transformers tells no number of items, so that means of batches are added up
        task = count * sum(seen.model(**batch).loss for batch in batches[:accumulated])
    assert_gradients(seen, (0.6 * task + 0.4 * terms) / count, rough=True)


def relative(s, t, mask=None):
    if mask is not None:
        s, t = s * mask[..., None], t * mask[..., None]
    return (s - t).square().sum() / t.square().sum()


def test_hidden_states_and_attention_maps_of_text_leave_padding_out(tmp_path):
    def build():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        return hf.BertForSequenceClassification(
            hf.BertConfig(
                **sizes,
                vocab_size=40,
                max_position_embeddings=16,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="eager",
            )
        ).double()

    model = build()
    teacher = teacher_like(model)
    data = samples()
    for i, s in enumerate(data):
        s["attention_mask"] = (torch.arange(7) < 7 - i % 3).long()
    distill = Distill(teacher, alpha=0.0, hidden=2.0, attention=0.5)
    seen, batches = first_step(tmp_path, model, distill, data=data)
    asked = {"output_hidden_states": True, "output_attentions": True}
    s, t = seen.model(**batches[0], **asked), teacher.eval()(**batches[0], **asked)
    mask = batches[0]["attention_mask"].double()
    states = sum(relative(a, b.detach(), mask) for a, b in zip(s.hidden_states, t.hidden_states, strict=True)) / 3
    maps = 0
    for a, b in zip(s.attentions, t.attentions, strict=True):
        p, q = b.detach().mean(1), a.mean(1)
        each = torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0).sum(-1)
        maps = maps + (each * mask).sum() / mask.sum() / 2
    assert_gradients(seen, s.loss + 2.0 * states + 0.5 * maps)


def test_feature_maps_of_fewer_channels_are_compared_by_where_they_look():
    from hap_hf.trainer.divergence import hidden_divergence

    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 5, 5).double(), torch.randn(3, 6, 5, 5).double()
    maps = [(x**2).sum(1).reshape(3, -1) for x in (s, t)]
    unit = [m / m.pow(2).sum(1, keepdim=True).sqrt() for m in maps]
    expected = sum(((unit[0][i] - unit[1][i]) ** 2).sum() for i in range(3)) / 3
    torch.testing.assert_close(hidden_divergence(s, t, None), expected)
    assert hidden_divergence(t * 2, torch.cat([t, 0 * t], 1), None) < 1e-12
    torch.testing.assert_close(hidden_divergence(2 * t, t, None), torch.ones((), dtype=torch.float64))
    with pytest.raises(UnsupportedModelError, match="leave hidden at 0"):
        hidden_divergence(s[..., :2], t, None)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems_have_their_own_divergence(tmp_path, problem):
    torch.manual_seed(0)
    model = exact_model()
    model.config.problem_type = problem
    model.config.num_labels = model.num_labels = 2
    teacher = teacher_like(model)
    data = [{**s, "labels": torch.tensor([0.0, 1.0]).double()} for s in samples()]
    seen, batches = first_step(tmp_path, model, Distill(teacher, alpha=1.0, temperature=T), data=data)
    z, t = (m.eval()(**without_labels(batches[0])).logits for m in (seen.model, teacher))
    t = t.detach()
    if problem == "regression":
        expected = (z - t).square().mean()
    else:
        p, q = (t / T).sigmoid(), (z / T).sigmoid()
        expected = T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert_gradients(seen, expected)


def test_evaluation_shows_the_loss_of_the_task(tmp_path):
    def evaluated(*callbacks):
        trainer = make_trainer(tmp_path, exact_model(), *callbacks, eval_dataset=samples(8), max_steps=1)
        trainer.train()
        # The same weights for both.
        trainer.model.load_state_dict(exact_model().state_dict())
        return trainer.evaluate()["eval_loss"]

    assert evaluated(Distill(teacher_like(exact_model()))) == evaluated()


def test_the_teacher_is_the_model_right_before_the_first_round(tmp_path):
    distill, pruner = Distill(), HessianPruner(config(method="magnitude"), step=2, num_rounds=2, interval=2)
    settings = {"lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, exact_model(), pruner, distill, max_steps=6, **settings)
    trainer.train()
    plain = make_trainer(tmp_path, exact_model(), max_steps=2, **settings)
    plain.train()
    assert_same(distill._kept, plain.model)
    assert not any(p.requires_grad for p in distill._kept.parameters())
    assert trainer.model.num_parameters() < distill._kept.num_parameters()


def test_scores_are_those_of_the_task_unless_asked_otherwise(tmp_path):
    def threshold(*callbacks, **given):
        pruner = HessianPruner(config(method="taylor"), **given)
        make_trainer(tmp_path, exact_model(), pruner, *callbacks, max_steps=1).train()
        return pruner.reports[0].threshold

    teacher = teacher_like(exact_model())

    def by_hand(model, batch):
        outputs, answers = model(**batch), teacher.eval()(**batch).logits.detach()
        return 0.5 * outputs.loss + 0.5 * softened(outputs.logits, answers, 2.0).mean()

    plain = threshold()
    assert threshold(Distill(teacher)) == plain
    with_teacher = threshold(Distill(teacher, in_scores=True))
    assert with_teacher == pytest.approx(threshold(loss_fn=by_hand), rel=1e-9)
    assert with_teacher != pytest.approx(plain, rel=1e-3)


def test_a_teacher_in_bf16_is_a_copy_and_answers_about_the_same(tmp_path):
    teacher = teacher_like(Net())
    losses = []
    for dtype in (None, "bfloat16"):
        distill = Distill(teacher, alpha=1.0, dtype=dtype)
        trainer = make_trainer(tmp_path, Net(), distill, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert {p.dtype for p in distill._kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1]


WRONG = {
    "alpha is the share": {"alpha": 1.5},
    "temperature must be above 0": {"temperature": 0.0},
    "nothing would be distilled": {"alpha": 0.0},
    "hidden must be a number": {"hidden": -1.0},
    "dtype must be a floating-point dtype": {"dtype": "int8"},
    "in_scores must be": {"in_scores": "yes"},
    "teacher must be a model": {"teacher": "my-bert"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        Distill(**WRONG[message])


def test_what_cannot_be_distilled_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match=r"pass the dense model, Distill\(teacher=...\)"):
        make_trainer(tmp_path, exact_model(), Distill()).train()
    with pytest.raises(ConfigError, match="attn_implementation='eager'"):
        make_trainer(tmp_path, exact_model(), Distill(exact_model(), attention=1.0)).train()


def test_a_teacher_with_other_classes_is_refused(tmp_path):
    other = hf.BertForSequenceClassification(hf.BertConfig(**{**exact_model().config.to_dict(), "num_labels": 3}))
    with pytest.raises(UnsupportedModelError, match="a teacher with the same classes"):
        make_trainer(tmp_path, exact_model(), Distill(other.double())).train()
