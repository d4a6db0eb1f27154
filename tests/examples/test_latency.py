"""The latency benchmark: what it compares, how it takes turns, and what it prints; never how long anything takes."""

from argparse import Namespace
from functools import partial

import latency
import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig

from hap_hf import ImplantConv2d, ImplantLinear, ModelSize

FEW = ["--batch_sizes", "1", "--runs", "2", "--warmup", "1", "--threads", "1"]
TINY_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


def cells_of(text: str) -> list[dict[str, str]]:
    """Return the lines of the table by their column's name."""
    head, _, *lines = ([c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|"))
    return [dict(zip(head, line, strict=True)) for line in lines]


def versions_of(*more: str) -> list[latency.Version]:
    options = latency.parse([*FEW, *more])
    name = "cifar_resnet20"
    return latency.make_versions(latency.build(name, options), latency.make_batch(name, 1, options), options)


def fake(name: str, params: int, macs: float) -> latency.Version:
    return latency.Version(name, nn.Identity(), 0.0, ModelSize(params, macs))


@pytest.fixture
def tiny_bert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BertConfig", partial(BertConfig, vocab_size=20, **TINY_BERT))


def test_the_table_has_a_line_for_each_batch_size_mode_and_version(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    words = ["--models", latency.BERT, "--batch_sizes", "1", "2", "--modes", "eager", "compiled"]
    words += ["--implant_ratio", "0.6", "--tokens", "6", *FEW[2:]]
    text = latency.main(words)
    assert text in capsys.readouterr().out
    assert f"python examples/benchmarks/latency.py {' '.join(words)}\n" in text
    rows = cells_of(text)
    assert [(r["model"], r["batch"], r["mode"], r["version"]) for r in rows] == [
        (latency.BERT, batch, mode, version)
        for batch in ("1", "2")
        for mode in ("eager", "compiled")
        for version in ("dense", "pruned", "with implants")
    ]
    for row in rows:
        dense = row["version"] == "dense"
        assert (row["MACs"] == "1.000") == (row["parameters"] == "1.000") == dense
        assert row["time"] == "1.000" if dense else 0 < float(row["MACs"]) < 1
        low, high = (float(ratio) for ratio in row["quartiles"].split(" to "))
        assert low <= float(row["time"]) <= high
        assert float(row["median, ms"]) > 0
        assert (row["units implanted"] != "0%") == (row["version"] == "with implants")
        assert row["runs"] == "2"


def test_implants_come_at_the_number_of_parameters_that_removal_alone_leaves() -> None:
    dense, pruned, implanted = versions_of("--implant_ratio", "0.6")
    assert any(isinstance(m, ImplantConv2d | ImplantLinear) for m in implanted.model.modules())
    assert implanted.size.params == pytest.approx(pruned.size.params, rel=0.02)
    assert pruned.size.params == sum(p.numel() for p in pruned.model.parameters()) < 0.9 * dense.size.params
    assert dense.size.params == sum(p.numel() for p in timm.create_model("cifar_resnet20").parameters())


@pytest.mark.parametrize("round_to", [1, 4])
def test_channels_are_rounded_as_asked(round_to: int) -> None:
    dense, pruned = versions_of("--implant_ratio", "0", "--round_to", str(round_to))
    widths = [m.out_channels for m in pruned.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 4 == 0 for width in widths) == (round_to == 4)
    assert pruned.size.macs == pytest.approx(0.5 * dense.size.macs, rel=0.03)


def test_several_image_models_share_a_table() -> None:
    rows = cells_of(latency.main(["--models", "cifar_resnet20", "test_vit", *FEW, "--implant_ratio", "0"]))
    assert [(r["model"], r["version"]) for r in rows] == [
        (model, version) for model in ("cifar_resnet20", "test_vit") for version in ("dense", "pruned")
    ]
    assert [float(r["MACs"]) < 1 for r in rows] == [False, True] * 2


def test_channels_last_is_the_layout_of_weights_and_images() -> None:
    options = latency.parse([*FEW, "--channels_last"])
    batch = latency.make_batch("cifar_resnet20", 2, options)
    versions = versions_of("--channels_last")
    for tensor in (batch["x"], *(p for v in versions for p in v.model.parameters() if p.dim() == 4)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    for version in versions:
        assert version.model(**batch).shape == (2, 10)


def test_a_model_without_a_place_for_implants_has_no_version_with_them() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).mean((2, 3))

    versions = latency.make_versions(Pointwise().eval(), {"x": torch.randn(1, 3, 8, 8)}, latency.parse(FEW))
    assert [v.name for v in versions] == ["dense", "pruned"]


def test_versions_run_in_turns_and_the_clock_waits_for_the_device() -> None:
    order: list[str] = []
    calls = [partial(order.append, name) for name in ("dense", "pruned")]
    times = latency.in_turns(calls, partial(order.append, "wait"), runs=2)
    assert order == ["wait", "dense", "wait", "wait", "pruned", "wait"] * 2
    assert [len(column) for column in times] == [2, 2]


def test_turns_end_after_the_time_limit_but_not_before_quartiles_mean_something() -> None:
    times = latency.in_turns([int], int, runs=1000, seconds=0.0)
    assert len(times[0]) == latency.MIN_RUNS


def test_the_ratio_is_taken_turn_by_turn() -> None:
    versions = [fake("dense", 100, 1000.0), fake("pruned", 40, 500.0)]
    # A machine that slows down tenfold: the ratio of the medians would be 6.
    lines = latency.rows_of(versions, ["m", "1", "eager"], [[1.0, 1.0, 10.0, 10.0, 1.0], [0.5, 0.6, 7.0, 6.0, 0.4]])
    assert lines[1] == ["m", "1", "eager", "pruned", "0%", "0.400", "0.500", "0.600", "0.500 to 0.600", "600.00", "5"]


def test_every_version_is_compiled_in_one_graph(monkeypatch: pytest.MonkeyPatch, tiny_bert: None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    flags = ["--models", latency.BERT, "--tokens", "6", "--modes", "compiled", "--implant_ratio", "0.6", *FEW]
    assert [row["version"] for row in cells_of(latency.main(flags))] == ["dense", "pruned", "with implants"]
    assert len(graphs) == 3


def test_what_does_not_compile_says_why_in_the_table(monkeypatch: pytest.MonkeyPatch, tiny_bert: None) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel | for this\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda model, **_: refuse)
    text = latency.main([
        "--models",
        latency.BERT,
        "--tokens",
        "6",
        "--modes",
        "compiled",
        "eager",
        "--implant_ratio",
        "0",
        *FEW,
    ])
    failed, *eager = cells_of(text)
    assert failed["version"] == "RuntimeError: no kernel / for this"
    assert failed["time"] == ""
    assert [row["mode"] for row in eager] == ["eager"] * 2


def test_an_error_without_a_compiler_is_an_error() -> None:
    def broken() -> None:
        raise ValueError("broken")

    module = nn.Module()
    module.forward = lambda **_: broken()
    with pytest.raises(ValueError, match="broken"):
        latency.measure([latency.Version("dense", module, 0.0, ModelSize(1, 1.0))], {}, "eager", latency.parse(FEW))


@pytest.mark.parametrize("flag", ["--runs", "--warmup"])
def test_too_few_runs_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        latency.parse([flag, "0"])
    assert f"{flag} must be at least" in capsys.readouterr().err


def test_the_device_is_named() -> None:
    options: Namespace = latency.parse([*FEW, "--channels_last"])
    assert latency.describe(options).endswith("1 CPU thread(s), float32, channels last")
