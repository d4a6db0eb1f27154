"""Small trainings of a tiny BERT for the tests of the callback."""

from contextlib import ExitStack
from dataclasses import fields

import torch
import transformers as hf
from cases import randomise_
from reference import logits, masked
from torch import nn
from transformers import Trainer, TrainingArguments

from hap_hf import HapConfig, HessianPruner, known_criteria

OF_THE_TRAINER = (
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "model_init",
    "optimizers",
    "preprocess_logits_for_metrics",
)


def tiny_model():
    return tiny_bert()


def tiny_bert(**changes):
    """Return the model with another config; the Trainer calls a ``model_init`` that takes arguments with some."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "num_labels": 2,
    }
    return randomise_(hf.BertForSequenceClassification(hf.BertConfig(**{**sizes, **changes})))


class Net(nn.Module):
    """The smallest model with something to remove."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(40, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, input_ids, labels=None, **kwargs):
        x = self.words(input_ids)
        logits = self.head((x + self.down(torch.relu(self.up(x)))).mean(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def exact_model():
    """Return a model whose training can be compared to that of a masked one: no dropout, in float64."""
    return tiny_bert(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()


def samples(count=48):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (count, 7), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones(7, dtype=torch.long), "labels": x.sum() % 2} for x in ids]


def make_trainer(tmp_path, model, *callbacks, data=None, kind=Trainer, arguments_kind=TrainingArguments, **settings):
    arguments = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "seed": 1,
    }
    extra = {k: settings.pop(k) for k in OF_THE_TRAINER if k in settings}
    args = arguments_kind(**{**arguments, **settings})
    callbacks = [c for c in callbacks if c is not None]
    return kind(model, args, train_dataset=data or samples(), callbacks=callbacks, **extra)


def criterion(name, **settings):
    """Return a criterion with those of some settings that it has."""
    kind = known_criteria()[name]
    own = {field.name for field in fields(kind)}
    return kind(**{k: v for k, v in settings.items() if k in own})


def config(*, method="mask_ggn", num_probes=2, **changes):
    amount = {} if {"target_params", "target_macs"} & set(changes) else {"prune_ratio": 0.4}
    method = criterion(method, num_probes=num_probes)
    return HapConfig(**{**amount, "method": method, "max_batches": 2, "progress": False, **changes})


def assert_same(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


class Mask(hf.TrainerCallback):
    """Zeroes, where they are read, the units that the rounds of another training removed, after the same steps."""

    def __init__(self, reports, steps):
        self.rounds = dict(zip(steps, units_removed(reports), strict=True))
        self.stack = ExitStack()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.rounds:
            self.stack.enter_context(masked(model, self.rounds[state.global_step]))


def units_removed(reports):
    """Return for each round the units it removed, by group and number as before the first round."""
    groups, left, rounds = {}, {}, []
    for report in reports:
        rounds.append({})
        for entry in report.plan:
            name = entry.group.name
            groups.setdefault(name, entry.group)
            units = left.get(name, list(range(entry.group.num_units)))
            rounds[-1][groups[name]] = [u for u, action in zip(units, entry.actions, strict=True) if action == "p"]
            left[name] = [u for u, action in zip(units, entry.actions, strict=True) if action == "k"]
    return rounds


def trained_pruned_and_masked(tmp_path, steps=(2,), changes=None, build=exact_model, **settings):
    """Train a model that is pruned after some steps, and one whose removed units are zeroed instead.

    Returns:
        The first one's trainer, its logits and those of the second.
    """
    settings = {"max_steps": steps[-1] + 3, "learning_rate": 1e-2, **settings}
    optimizer = settings.pop("optimizer", None)

    def trainer(model, *callbacks):
        own = {} if optimizer is None else {"optimizers": (optimizer(model.parameters()), None)}
        return make_trainer(tmp_path, model, *callbacks, **settings, **own)

    pruned_config = config(**{"method": "magnitude", "prune_ratio": 0.4, **(changes or {})})
    interval = steps[-1] - steps[0] if len(steps) > 1 else 1
    pruner = HessianPruner(pruned_config, step=steps[0], num_rounds=len(steps), interval=interval)
    pruned = trainer(build(), pruner)
    pruned.train()
    mask = Mask(pruner.reports, steps)
    whole = trainer(build(), mask)
    whole.train()
    batch = {k: torch.stack([s[k] for s in samples()]) for k in ("input_ids", "attention_mask")}
    assert pruned.model.num_parameters() < whole.model.num_parameters()
    with mask.stack:
        return pruned, logits(pruned.model, batch), logits(whole.model, batch)
