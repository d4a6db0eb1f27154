"""Small trainings of a tiny BERT for the tests of the callback."""

import torch
import transformers as hf
from cases import randomise_
from transformers import Trainer, TrainingArguments

from hap_hf import HapConfig

OF_THE_TRAINER = ("compute_loss_func", "compute_metrics", "eval_dataset", "model_init", "optimizers")


def tiny_model():
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=2,
    )
    return randomise_(hf.BertForSequenceClassification(config))


def samples(count=48):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (count, 7), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones(7, dtype=torch.long), "labels": x.sum() % 2} for x in ids]


def make_trainer(tmp_path, model, *callbacks, data=None, kind=Trainer, **settings):
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
    args = TrainingArguments(**{**arguments, **settings})
    callbacks = [c for c in callbacks if c is not None]
    return kind(model, args, train_dataset=data or samples(), callbacks=callbacks, **extra)


def config(**changes):
    amount = {} if {"target_params", "target_macs"} & set(changes) else {"prune_ratio": 0.4}
    return HapConfig(**{**amount, "num_probes": 2, "max_batches": 2, "progress": False, **changes})


def assert_same(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
