"""Pruning in two processes: the same as in one, checked, and without deadlocks."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate.utils import DistributedType
from distributed_runs import ALIKE, BATCH_NORMS, TRAININGS, image_model, image_samples, settings, text_model
from torch import nn

from hap_hf import DistributedError, UnsupportedModelError, prune
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.trainer import scoring_batches
from hap_hf.trainer.distributed import check_wrapping

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning")

TESTS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """Run ``distributed_runs.py`` in two processes, once for all workers of pytest, and return how to get results."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    finished = folder / "finished"
    try:
        folder.mkdir()
    except FileExistsError:
        while not finished.exists():
            time.sleep(0.2)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parents[1])]),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        done = subprocess.run(
            [*command, str(TESTS / "distributed_runs.py"), str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        finished.write_text(f"{done.returncode}\n{done.stderr}")

    def result(name):
        files = [folder / f"{name}.{rank}" for rank in (0, 1)]
        assert all(f.exists() for f in files), finished.read_text()[-3000:]
        return [pickle.loads(f.read_bytes()) for f in files]

    return result


def assert_bitwise(a, b):
    assert list(a) == list(b)
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


def assert_close(a, b, rtol=1e-11, atol=1e-12):
    assert list(a) == list(b)
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def without_threshold(stage):
    """Return a stage of a plan without the one number that is the same up to rounding only."""
    return {**stage, "provenance": {k: v for k, v in stage["provenance"].items() if k != "threshold"}}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_in_two_processes_ends_like_one_in_one_process(two_processes, name):
    first, second = two_processes(name)
    alone = ALIKE[name](rank=0, world=1)
    assert first["plan"] == second["plan"]
    assert_bitwise(first["weights"], second["weights"])
    assert_bitwise(first["buffers"], second["buffers"])
    assert any(key.endswith("input_range") for key in first["buffers"]) is (name == "rounded")
    assert_close(first["buffers"], alone["buffers"], rtol=1e-6, atol=1e-7)

    shared, own = ({**f["plan"], "stages": [without_threshold(s) for s in f["plan"]["stages"]]} for f in (first, alone))
    assert shared == own
    assert first["threshold"] == pytest.approx(alone["threshold"], rel=1e-11)
    assert any(s["bypasses"] for s in shared["stages"]) is (name == "bypasses")
    # Layers are fitted one on the output of the other, each by a system with a condition number of up to 1e5.
    assert_close(first["weights"], alone["weights"], rtol=1e-6, atol=1e-8)


def test_trainings_in_two_processes_train_what_surgery_made(two_processes):
    begin = two_processes("begin")[0]["weights"]
    later = two_processes("step, accumulated")[0]["weights"]
    dense = dict(text_model().named_parameters())
    assert sum(w.numel() for w in begin.values()) < sum(w.numel() for w in dense.values())
    assert any("implant" in name for name in begin)
    assert not torch.equal(begin["classifier.weight"], dense["classifier.weight"])
    assert not torch.equal(begin["classifier.weight"], later["classifier.weight"])


def test_scores_and_standard_errors_of_shares_are_those_of_all_batches(two_processes):
    alone = ALIKE["every_method"](rank=0, world=1)
    for shared in two_processes("every_method"):
        assert list(shared) == list(alone)
        for method, scores in shared.items():
            assert_close(scores.sensitivity, alone[method].sensitivity)
            assert_close(scores.standard_error, alone[method].standard_error)
            counts = [(s.num_batches, s.num_loss_terms) for s in (scores, alone[method])]
            assert counts[0] == counts[1], method


def test_statistics_and_moments_of_shares_are_those_of_all_batches(two_processes):
    alone = ALIKE["statistics"](rank=0, world=1)
    for shared in two_processes("statistics"):
        assert_close(shared["moments"], alone["moments"])
        assert_close(shared["buffers"], alone["buffers"])


def test_batch_norms_start_from_those_of_the_first_process(two_processes):
    first, second = two_processes("batch_norms")
    name = "stem.1.running_mean"
    assert not torch.equal(first["before"]["buffers"][name], second["before"]["buffers"][name])
    assert_bitwise(first["after"]["buffers"], second["after"]["buffers"])
    assert_bitwise(first["after"]["weights"], second["after"]["weights"])

    model = image_model()
    model.load_state_dict({**first["before"]["weights"], **first["before"]["buffers"]})
    config = settings(**BATCH_NORMS)
    report = prune(model, scoring_batches(image_samples(), hf.default_data_collator, 4, config), config)
    assert second["threshold"] == pytest.approx(report.threshold, rel=1e-11)
    assert_bitwise(second["after"]["weights"], dict(model.named_parameters()))
    assert_bitwise(second["after"]["buffers"], dict(model.named_buffers()))


def test_batch_norms_stay_as_they_are_where_one_process_cannot_recalibrate(two_processes):
    dense = sum(p.numel() for p in image_model().parameters())
    for found in two_processes("one_sample"):
        kept = found["buffers"]["stem.1.running_mean"]
        assert kept.numel() > 0
        assert sum(w.numel() for w in found["weights"].values()) < dense
        assert set(kept.tolist()) <= set(found["old"].tolist())


def test_a_model_pruned_between_two_trainings_is_trained_in_step(two_processes):
    first, second = two_processes("trained_twice")
    assert_bitwise(first["weights"], second["weights"])
    assert_close(first["weights"], ALIKE["trained_twice"](rank=0, world=1)["weights"], rtol=1e-6, atol=1e-8)


def test_a_training_resumed_in_two_processes_ends_with_the_same_weights(two_processes):
    for found in two_processes("resumed"):
        assert_bitwise(found["again"]["weights"], found["whole"]["weights"])


def test_a_process_that_is_short_of_memory_scores_in_smaller_batches_than_the_others(two_processes):
    first, second = two_processes("short_of_memory")
    assert sum(w.numel() for w in first["weights"].values()) < sum(p.numel() for p in text_model().parameters())
    assert first["plan"] == second["plan"]
    assert_bitwise(first["weights"], second["weights"])


def test_hooks_on_the_wrapper_outlive_pruning(two_processes):
    first, second = two_processes("with_hooks")
    assert [s["forward"] for s in first["steps"]] == [1] * 8
    assert all(s["reduction"] >= 1 for s in first["steps"])
    assert_bitwise(first["weights"], second["weights"])


FAILURES = {
    "nan_loss": (
        "CurvatureError: process 1 of 2 failed: batch 0: expected a finite loss, got nan",
        "CurvatureError: batch 0: expected a finite loss, got nan",
    ),
    "broken_sample": ("DistributedError: process 1 of 2 failed: OSError: sample ", "OSError: sample "),
    "late_failure": (
        "DistributedError: process 1 of 2 failed: MemoryError: no memory left for the report",
        "MemoryError: no memory left for the report",
    ),
    "short_of_memory_later": (
        "DistributedError: process 1 of 2 failed: OutOfMemoryError: out of memory",
        "OutOfMemoryError: out of memory",
    ),
    "unlogged_report": (
        "ConnectionError: the tracker is away",
        "DistributedError: process 0 of 2 failed: ConnectionError: the tracker is away",
    ),
}
"""What fails in one process, and what the first and the second say."""

DIFFERENCES = {
    "other_plan": ("plan", "threshold, actions; start every process"),
    "other_weights": ("weights after pruning", "bert.embeddings.LayerNorm.bias; start every process"),
    "drifted": ("weights before pruning", "classifier.bias; load the same checkpoint in every process"),
    "other_settings": ("settings of HessianPruner", "method, interval; start every process"),
}
"""What differs between the processes, and what both say."""

REFUSED = {
    "fully_sharded": "this training uses FSDP; prune first with hap_hf.prune",
    "tensor_parallel": "model.embed_tokens.weight is a DTensor, of which each process holds a part; prune the whole",
    "remembering_hook": "uses a communication hook that remembers gradients; prune first",
}
"""What is not supported, and what both processes say."""


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_in_one_process_is_raised_in_all(two_processes, name):
    for found, text in zip(two_processes(name), FAILURES[name], strict=True):
        assert found["error"].startswith(text)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_between_processes_is_named(two_processes, name):
    what, which = DIFFERENCES[name]
    text = f"DistributedError: expected the same {what} in all 2 processes, got different values of {which}"
    for found in two_processes(name):
        assert found["error"].startswith(text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_in_all_processes(two_processes, name):
    for found in two_processes(name):
        assert found["error"].startswith("UnsupportedModelError")
        assert REFUSED[name] in found["error"]


LEFT_WHOLE = ["nan_loss", "short_of_memory_later", "broken_sample", "late_failure", "other_plan", "other_weights"]


@pytest.mark.parametrize("name", LEFT_WHOLE)
def test_what_goes_wrong_in_one_process_leaves_the_models_of_all_as_they_were(two_processes, name):
    assert [f["notes"] for f in two_processes(name)] == [["the model is as it was"]] * 2


def trainer_with(**changes):
    """Return what ``check_wrapping`` looks at in a Trainer."""
    parallelism = {f"{name}_enabled": changes.pop(name, False) for name in ("tp", "cp", "sp")}
    accelerator = SimpleNamespace(
        distributed_type=changes.pop("distributed_type", DistributedType.NO),
        parallelism_config=SimpleNamespace(**parallelism),
    )
    model = changes.pop("model", nn.Linear(2, 2))
    args = SimpleNamespace(world_size=changes.pop("world_size", 1))
    assert not changes
    return SimpleNamespace(accelerator=accelerator, args=args, model=model, model_wrapped=model)


def tensor_parallel_model():
    model = nn.Linear(2, 2)
    model.tp_size = 2
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed_type": DistributedType.FSDP, "world_size": 2}, "uses FSDP; prune first"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "uses DeepSpeed; prune first"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "uses Megatron-LM; prune first"),
        ({"distributed_type": DistributedType.XLA}, "uses XLA; prune first"),
        ({"tp": True}, "uses tensor parallelism; prune first"),
        ({"model": tensor_parallel_model()}, "uses tensor parallelism; prune first"),
        ({"cp": True}, "uses context parallelism; prune first"),
        ({"sp": True}, "uses sequence parallelism; prune first"),
        ({"world_size": 4}, "uses 4 processes without DistributedDataParallel; prune first"),
    ],
    ids=str,
)
def test_trainings_of_models_in_parts_are_refused_by_name(changes, message):
    trainer = trainer_with(**changes)
    with pytest.raises(UnsupportedModelError, match=message):
        check_wrapping(trainer, trainer.model)


def test_a_training_in_one_process_is_not_refused():
    trainer = trainer_with()
    check_wrapping(trainer, trainer.model)


def test_shares_are_numbered_as_the_whole():
    shares = {r: list(Processes(r, 3).share("abcdefgh")) for r in range(3)}
    assert shares == {0: ["a", "d", "g"], 1: ["b", "e", "h"], 2: ["c", "f"]}
    for rank, share in shares.items():
        assert ["abcdefgh"[Processes(rank, 3).number(i)] for i in range(len(share))] == share


def test_a_process_by_itself_exchanges_nothing():
    x = torch.ones(2)
    assert ALONE.gather("stage", x) == [x]
    assert ALONE.summed("stage", {"x": x})["x"] is x
    assert ALONE.first("stage", x) is x
    ALONE.check_same("values", {"x": 1}, "do something")
    with pytest.raises(OSError, match="as it is"), ALONE.agreeing("stage"):
        raise OSError("as it is")


def test_an_error_of_processes_is_also_a_runtime_error():
    assert issubclass(DistributedError, RuntimeError)
