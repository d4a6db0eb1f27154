"""What ``test_distributed.py`` runs: in two processes under torchrun and, for comparison, in one."""

import copy
import logging
import os
import pickle
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
import transformers as hf
from accelerate.utils import DDPCommunicationHookType
from cases import build, randomise_
from scored_models import score
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import IterableDataset
from trainings import criterion
from transformers import Trainer, TrainingArguments

import hap_hf.bypassing
import hap_hf.cut
import hap_hf.decision
import hap_hf.pipeline
from hap_hf import (
    Distill,
    HapConfig,
    HessianPruner,
    QuantizeAware,
    apply_plan_,
    decide,
    find_groups,
    plan_of,
    prune,
    recalibrate_batch_norms_,
)
from hap_hf.criteria import known_criteria
from hap_hf.evidence.processes import Processes
from hap_hf.selection.make import choose
from hap_hf.surgery import collect_input_moments

TRAININGS = {
    "begin": {"pruner": {}, "config": {"method": "mask_ggn"}},
    "step, accumulated": {"pruner": {"step": 2}, "batches_a_step": 4},
    "epoch, checkpointed, fewer batches than processes": {
        "pruner": {"epoch": 1},
        "gradient_checkpointing": True,
        "config": {"max_batches": 1},
    },
    "rounds, static graph": {
        "pruner": {"step": 1, "num_rounds": 2, "interval": 2},
        "ddp_find_unused_parameters": False,
        "ddp_static_graph": True,
    },
    "stream of samples": {"pruner": {"step": 1}, "data": lambda: Stream(), "max_steps": 3},
    "shrinking": {"pruner": {"step": 3, "regularise": {"steps": 2, "interval": 1, "ratio": 9.0}}, "max_steps": 4},
    "bypasses": {
        "pruner": {"step": 1},
        "config": {
            "implants": "auto",
            "implant_ratio": 0.0,
            "prune_ratio": None,
            "target_params": 0.5,
            "method": "mask_ggn",
        },
        "max_steps": 2,
        "taken": True,
    },
    "given plan": {"pruner": {"step": 1}, "plan": lambda: decision(), "max_steps": 2},
    "rounded": {"pruner": {"step": 1}, "helpers": lambda: [QuantizeAware({"weight_bits": 6}, step=2)], "max_steps": 5},
    "distilled": {"pruner": {"step": 1}, "helpers": lambda: [Distill(hidden=0.5)], "max_steps": 3},
}
"""Trainings that must end alike in one process and in two."""


def text_model():
    """Return a tiny model with a loss a token and without dropout, which differs from process to process."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return randomise_(hf.BertForTokenClassification(config)).double()


def text_samples(count=32):
    """Return samples with different numbers of loss terms."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 40, (count, 7), generator=generator)
    labels = torch.randint(0, 3, (count, 7), generator=generator)
    labels[torch.rand(count, 7, generator=generator) < torch.linspace(0, 0.9, count)[:, None]] = -100
    mask = torch.ones(7, dtype=torch.long)
    return [{"input_ids": x, "attention_mask": mask, "labels": y} for x, y in zip(ids, labels, strict=True)]


class Stream(IterableDataset):
    """Samples without an index."""

    def __iter__(self):
        return iter(text_samples())


class ImageModel(nn.Module):
    """A small network with batch norms."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(self.stem(pixel_values)).mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def image_model():
    torch.manual_seed(0)
    return randomise_(ImageModel()).double()


def image_samples(count=32, size=6):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return [{"pixel_values": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(images)]


def batches_of(samples, sizes):
    rest = iter(samples)
    return [hf.default_data_collator([next(rest) for _ in range(size)]) for size in sizes]


def settings(*, method="hessian", num_probes=2, **changes):
    return HapConfig(**{
        "prune_ratio": 0.5,
        "implant_ratio": 0.5,
        "method": criterion(method, num_probes=num_probes),
        "max_batches": 3,
        "progress": False,
        **changes,
    })


def make_trainer(model, pruner, world, *, data=None, batches_a_step=2, helpers=(), **arguments):
    """Return a Trainer that sees the same samples in each step, whatever the number of processes."""
    args = TrainingArguments(**{
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": batches_a_step // world,
        "learning_rate": 0.05,
        "optim": "sgd",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 1,
        **arguments,
    })
    return Trainer(
        model, args, train_dataset=data or text_samples(), callbacks=[*([pruner] if pruner else []), *helpers]
    )


def outcome(model):
    """Return the weights and the plan."""
    plan = plan_of(model)
    return {
        "weights": {k: v.detach().clone() for k, v in model.named_parameters()},
        "buffers": {k: v.clone() for k, v in model.named_buffers()},
        "plan": None if plan is None else plan.to_dict(),
    }


def decision():
    """Return what is decided before the training, by each process alone."""
    config = settings(method="magnitude")
    return decide(config.evidence(text_model(), batches_of(text_samples(), (4,))), config)


def training(name, rank, world):
    run = dict(TRAININGS[name])
    plan = run.pop("plan", lambda: None)()
    pruner = HessianPruner(settings(**run.pop("config", {})), plan=plan, **run.pop("pruner"))
    data, helpers = run.pop("data", text_samples)(), run.pop("helpers", list)()
    # On random weights paths need not be better; whether they are taken is not the question here.
    real = hap_hf.bypassing.bypassed_repair
    with patch.object(hap_hf.bypassing, "bypassed_repair") as fitted:
        fitted.side_effect = (lambda *args: replace(real(*args), loss=-1.0)) if run.pop("taken", False) else real
        trainer = make_trainer(text_model(), pruner, world, data=data, helpers=helpers, **run)
        trainer.train()
    return {"threshold": pruner.reports[-1].threshold, **outcome(trainer.model)}


def every_method(rank, world):
    """Return the scores by each method on batches of different sizes, one of them without loss terms."""
    model = text_model().eval()
    batches = batches_of(text_samples(), (4, 2, 6, 3, 4))
    batches[1]["labels"].fill_(-100)
    groups = find_groups(model, batches[0])
    processes = Processes(rank, world)
    share = list(processes.share(batches))
    return {
        method: score(model, groups, share, settings(method=method, max_batches=None), processes=processes)
        for method in known_criteria()
    }


def statistics(rank, world):
    """Return batch norm statistics and moments of inputs, over batches of different sizes."""
    processes = Processes(rank, world)
    model = image_model()
    share = list(processes.share(batches_of(image_samples(), (4, 2, 6))))
    moments = collect_input_moments(model, ["body.0.weight", "head.weight"], share, processes=processes)
    recalibrate_batch_norms_(model, share, processes=processes)
    return {"moments": moments, **outcome(model)}


BATCH_NORMS = {"implant_ratio": 0.0, "recalibrate": False}


def batch_norms(rank, world):
    """Return a network whose batch norms count other samples in each process, as pruning leaves it."""
    found = {}

    class Remember(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            found[state.global_step] = outcome(model)

    pruner = HessianPruner(settings(**BATCH_NORMS), step=2)
    trainer = make_trainer(image_model(), pruner, world, data=image_samples(), max_steps=2)
    trainer.callback_handler.callbacks.insert(0, Remember())
    trainer.train()
    return {"before": found[2], "after": outcome(trainer.model), "threshold": pruner.reports[0].threshold}


def one_sample(rank, world):
    """Return what becomes of batch norms where one process alone has a batch that they cannot be recalibrated on."""
    model = image_model()
    batches = batches_of(image_samples(size=1), (4, 1))
    trainer = make_trainer(
        model, HessianPruner(settings(), batches=batches), world, data=image_samples(size=1), max_steps=1
    )
    old = model.stem[1].running_mean.uniform_(0.2, 0.4).clone()
    found = {}

    class Remember(hf.TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            found.update(outcome(model))

    trainer.add_callback(Remember())
    trainer.train()
    return {"old": old, **found}


def trained_twice(rank, world):
    """Return the weights after a second training of the same Trainer, with a model that was pruned in between."""
    trainer = make_trainer(text_model(), None, world, num_train_epochs=1)
    trainer.train()
    prune(trainer.model, batches_of(text_samples(), (4, 4)), settings(), optimizer=trainer.optimizer.optimizer)
    trainer.add_callback(HessianPruner(settings(), step=4))
    trainer.train()
    return outcome(trainer.model)


def resumed(rank, world, folder):
    """Return the weights of a training, and those of the same training from a checkpoint in between."""
    arguments = {"output_dir": f"{folder}/resumed-{world}", "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(text_model(), HessianPruner(settings(), step=2), world, **arguments)
    whole.train()
    again = make_trainer(text_model(), HessianPruner(settings(), step=2), world, **arguments)
    again.train(resume_from_checkpoint=f"{folder}/resumed-{world}/checkpoint-3")
    return {"whole": outcome(whole.model), "again": outcome(again.model)}


def tensor_parallel(rank, world, folder):
    """Return what pruning a model says of which each process holds a part."""
    if rank == 0:
        build("llama").float().save_pretrained(f"{folder}/llama")
    dist.barrier()
    model = hf.AutoModelForCausalLM.from_pretrained(f"{folder}/llama", tp_plan="auto")
    ids = torch.randint(3, 50, (2, 7))
    prune(model, [{"input_ids": ids, "labels": ids}], settings())


def with_hooks(rank, world):
    """Return how often hooks on the wrapper were called in each step, of which one prunes."""
    calls = {"forward": 0, "reduction": 0}
    steps = []
    trainer = make_trainer(text_model(), HessianPruner(settings(), step=2), world)

    def on_forward(module, args, output):
        calls["forward"] += 1

    def on_reduction(state, bucket):
        calls["reduction"] += 1
        return allreduce_hook(state, bucket)

    class Count(hf.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            trainer.model_wrapped.register_forward_hook(on_forward)
            trainer.model_wrapped.register_comm_hook(None, on_reduction)

        def on_step_end(self, *args, **kwargs):
            steps.append(dict(calls))
            calls.update(forward=0, reduction=0)

    trainer.add_callback(Count())
    trainer.train()
    return {"steps": steps, **outcome(trainer.model)}


def remembering_hook(rank, world):
    trainer = make_trainer(text_model(), HessianPruner(settings()), world)
    trainer.accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.POWER_SGD
    trainer.train()


def fully_sharded(rank, world):
    make_trainer(text_model(), HessianPruner(settings()), world, fsdp="full_shard").train()


def other_settings(rank, world):
    make_trainer(text_model(), HessianPruner(settings(num_probes=2 + rank), interval=1 + rank), world).train()


def drifted(rank, world):
    class Drift(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.classifier.bias += 1e-12 * rank

    trainer = make_trainer(text_model(), HessianPruner(settings(), step=1), world)
    trainer.callback_handler.callbacks.insert(0, Drift())
    trainer.train()


def nan_loss(rank, world):
    def loss(model, batch):
        return model(**batch).loss * (float("nan") if rank == 1 else 1.0)

    return untouched(HessianPruner(settings(), loss_fn=loss), world)


def short_of_memory(rank, world):
    """Return the outcome where one process must score in smaller batches."""

    def loss(model, batch):
        if rank == 1 and len(batch["labels"]) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return model(**batch).loss

    trainer = make_trainer(text_model(), HessianPruner(settings(), loss_fn=loss), world, max_steps=1)
    trainer.train()
    return outcome(trainer.model)


def short_of_memory_later(rank, world):
    """Return what becomes of the models if that happens when the others know the first of two results."""
    summed = Processes.summed
    known = []

    def noted(self, stage, values):
        known.extend([stage] if stage == "scores" else [])
        return summed(self, stage, values)

    def loss(model, batch):
        if rank == 1 and known:
            raise torch.OutOfMemoryError("out of memory")
        return model(**batch).loss

    Processes.summed = noted
    try:
        return untouched(HessianPruner(settings(method="hessian_split"), loss_fn=loss), world)
    finally:
        Processes.summed = summed


class BrokenSamples:
    def __init__(self, rank):
        self.samples, self.rank = text_samples(), rank

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        if self.rank == 1:
            raise OSError(f"sample {i} cannot be read")
        return self.samples[i]


def broken_sample(rank, world):
    return untouched(HessianPruner(settings()), world, data=BrokenSamples(rank))


def unlogged_report(rank, world):
    class Tracker(hf.TrainerCallback):
        def on_log(self, *args, **kwargs):
            if rank == 0:
                raise ConnectionError("the tracker is away")

    trainer = make_trainer(text_model(), HessianPruner(settings()), world)
    trainer.add_callback(Tracker())
    trainer.train()


def other_plan(rank, world):
    def chosen(groups, scores, config):
        return choose(groups, scores, settings(prune_ratio=0.5 - 0.2 * rank))

    return replaced(hap_hf.pipeline, "choose", chosen, world)


def other_weights(rank, world):
    def applied(model, plan, **kwargs):
        changes = apply_plan_(model, plan, **kwargs)
        model.bert.embeddings.LayerNorm.bias = nn.Parameter(model.bert.embeddings.LayerNorm.bias + 1e-12 * rank)
        return changes

    return replaced(hap_hf.cut, "apply_plan_", applied, world)


def late_failure(rank, world):
    """Return what becomes of the models if one process fails when everything is done."""

    def reported(*args, **kwargs):
        if rank == 1:
            raise MemoryError("no memory left for the report")
        return hap_hf.report.make_report(*args, **kwargs)

    return replaced(hap_hf.decision, "make_report", reported, world)


def replaced(module, name, substitute, world):
    original = getattr(module, name)
    setattr(module, name, substitute)
    try:
        return untouched(HessianPruner(settings()), world)
    finally:
        setattr(module, name, original)


def untouched(pruner, world, **arguments):
    """Train, and on an error add a note if the model is as it was."""
    model = text_model()
    before = copy.deepcopy(model.state_dict())
    try:
        make_trainer(model, pruner, world, **arguments).train()
    except Exception as error:
        after = model.state_dict()
        same = list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items())
        if same and plan_of(model) is None:
            error.add_note("the model is as it was")
        raise


ALIKE = {name: partial(training, name) for name in TRAININGS}
ALIKE |= {f.__name__: f for f in (every_method, statistics, trained_twice)}
"""What returns the same in one process and in two."""
OTHERS = [batch_norms, one_sample, with_hooks, remembering_hook, fully_sharded, other_settings, drifted, nan_loss]
OTHERS += [
    short_of_memory,
    short_of_memory_later,
    broken_sample,
    unlogged_report,
    other_plan,
    other_weights,
    late_failure,
]
WITH_FOLDER = [resumed, tensor_parallel]


def main(folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    runs = {**ALIKE, **{f.__name__: f for f in OTHERS}, **{f.__name__: partial(f, folder=folder) for f in WITH_FOLDER}}
    # What ends the training on every process must leave them able to talk: the later runs tell.
    for name, run in runs.items():
        start = time.perf_counter()
        try:
            result = run(rank=rank, world=world)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "notes": getattr(error, "__notes__", [])}
        logging.getLogger("distributed_runs").warning("%s took %.1f s", name, time.perf_counter() - start)
        Path(folder, f"{name}.{rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
