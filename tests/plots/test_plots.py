"""Pictures show the numbers that they are made from, in grey, at 600 pixels."""

import io
from dataclasses import replace

import numpy as np
import pytest
from documented import bert, text_batches
from PIL import Image

from hap_hf import ConfigError, HapConfig, Sensitivity, allocate_bits, bit_frontier, decide, plots
from hap_hf.names.shortened import short_names
from hap_hf.tradeoff import Tradeoff, TradeoffPoint


@pytest.fixture(scope="module")
def report():
    model, config = bert(), HapConfig(target_params=0.5, implant_ratio=0.4, num_passes=1, progress=False)
    return decide(config.evidence(model, text_batches()), config).expected


SWEEP = Tradeoff(
    (
        TradeoffPoint(1.0, 2_000_000, 4e6, 0.2, 0.9, 5.0),
        TradeoffPoint(0.7, 1_400_000, 3e6, 0.21, 0.895, 4.0, 0.005),
        TradeoffPoint(0.4, 800_000, 2e6, 0.4, 0.7, 3.0, 0.1),
    ),
    "accuracy",
    True,
)


BITS = Sensitivity(
    {f"layer{i}": {3: 0.3 / i, 4: 0.05 / i, 8: 1e-5 / i} for i in (1, 2, 5, 9)},
    sizes={"layer1": 90, "layer2": 400, "layer5": 400, "layer9": 1000},
)


def all_pictures(report):
    return {
        "sensitivity": plots.plot_sensitivity(report),
        "neurons": plots.plot_sensitivity(report, "ffn"),
        "widths": plots.plot_widths(report),
        "threshold": plots.plot_threshold(report),
        "sweep": plots.plot_tradeoff(SWEEP),
        "losses": plots.plot_losses(SWEEP),
        "bits": plots.plot_bits(BITS, allocate_bits(BITS, average_bits=4)),
        "frontier": plots.plot_bits(BITS),
    }


def test_pictures_are_grey_600_pixels_wide_and_nothing_is_cut_off(report, tmp_path):
    for name, picture in all_pictures(report).items():
        pixels = np.asarray(Image.open(io.BytesIO(picture._repr_png_())).convert("RGB")).astype(int)
        assert pixels.shape[1] == 600, name
        assert (pixels.max(-1) - pixels.min(-1)).max() == 0, f"{name} has colours"
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == 255).all(), f"{name} reaches the edge"
        picture.save(tmp_path / f"{name}.svg")
        first = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "<svg" in first
    with pytest.raises(ConfigError, match=r"written as \.png or \.svg, got 'x\.bmp'"):
        picture.save(tmp_path / "x.bmp")


def test_marks_lie_at_the_sensitivities_with_two_standard_errors(report):
    (axes,) = plots.plot_sensitivity(report).axes
    drawn = sorted(
        float(x) for marks in axes.collections if hasattr(marks, "get_offsets") for x, _ in marks.get_offsets()
    )
    heads = [g for g in report.groups if g.kind == "heads"]
    values = sorted(float(v) for g in heads for v in report.scores.sensitivity[g.name])
    assert [x for x in drawn if any(abs(x - v) < 1e-12 for v in values)] == values
    lines = [c.get_segments() for c in axes.collections if hasattr(c, "get_segments")]
    widths = sorted(float(s[1][0] - s[0][0]) for segments in lines for s in segments if s[0][1] == s[1][1])
    errors = sorted(4 * float(e) for g in heads for e in report.scores.standard_error[g.name])
    assert widths == pytest.approx(errors, rel=1e-6, abs=1e-12)


def test_bars_are_the_widths(report):
    for axes, kind in zip(plots.plot_widths(report).axes, ("heads", "ffn"), strict=True):
        groups = [g for g in report.groups if g.kind == kind]
        everything, survivors, kept = axes.containers
        assert [bar.get_width() for bar in everything] == [g.units for g in groups]
        assert [bar.get_width() for bar in survivors] == [g.kept + g.implanted for g in groups]
        assert [bar.get_width() for bar in kept] == [g.kept for g in groups]


def test_the_picture_of_the_cut_counts_what_the_report_counts(report):
    (axes,) = plots.plot_threshold(report).axes
    total = sum(g.units for g in report.groups)
    assert axes.get_title() == f"{report.uncertain_units} of {total} units lie within two standard errors"


def test_the_chosen_point_is_the_smallest_that_is_nearly_as_good():
    assert SWEEP.chosen() is SWEEP.points[1]
    assert SWEEP.chosen(0.5) is SWEEP.points[2]
    worse = replace(SWEEP, points=(SWEEP.points[0], SWEEP.points[2]))
    assert worse.chosen() is None
    plots.plot_tradeoff(worse)
    losses = replace(SWEEP, higher_is_better=False, points=tuple(replace(p, value=p.loss) for p in SWEEP.points))
    assert losses.chosen(0.1) is losses.points[1]


def test_predicted_and_measured_losses_are_those_of_the_points():
    (axes,) = plots.plot_losses(SWEEP).axes
    dense, predicted, measured = (line.get_xydata().tolist() for line in axes.lines)
    assert [y for _, y in dense] == [0.2, 0.2]
    assert predicted == [pytest.approx([70, 0.205]), pytest.approx([40, 0.3])]
    assert measured == [pytest.approx([70, 0.21]), pytest.approx([40, 0.4])]


def test_the_frontier_is_drawn_with_the_same_bits_for_all_and_the_chosen_ones():
    chosen = allocate_bits(BITS, average_bits=4)
    axes, bars = plots.plot_bits(BITS, chosen).axes
    line = axes.lines[0]
    frontier = bit_frontier(BITS)
    assert list(line.get_xdata()) == pytest.approx([a.weight_bytes / 1e3 for a in frontier])
    assert list(line.get_ydata()) == [a.rise for a in frontier]
    same, star = (marks.get_offsets().tolist() for marks in axes.collections)
    rises = {b: sum(r[b] for r in BITS.rise.values()) for b in (3, 4, 8)}
    assert same == [pytest.approx([1890 * b / 8e3, rise]) for b, rise in rises.items()]
    assert star == [pytest.approx([chosen.weight_bytes / 1e3, chosen.rise])]
    assert chosen.rise < rises[4]
    assert [bar.get_height() for bar in bars.containers[0]] == [chosen.bits[name] for name in BITS.rise]


def test_without_what_it_shows_a_picture_says_so(report):
    bare = replace(report, scores=None)
    for draw in (plots.plot_sensitivity, plots.plot_threshold):
        with pytest.raises(ConfigError, match=r"no scores; keep pruning_scores\.safetensors"):
            draw(bare)
    with pytest.raises(ConfigError, match="no channels were scored, only"):
        plots.plot_sensitivity(report, "channels")
    with pytest.raises(ConfigError, match="no point has a prediction"):
        plots.plot_losses(replace(SWEEP, points=SWEEP.points[:1]))
    with pytest.raises(ConfigError, match="names no group"):
        plots.plot_widths(replace(bare, groups=()))


def test_names_keep_what_tells_them_apart():
    names = ["bert.encoder.layer.0.attention:heads", "bert.encoder.layer.11.attention:heads"]
    assert short_names(names) == ["layer.0.attention", "layer.11.attention"]
    assert short_names(["a.b:ffn"]) == ["a.b"]
    assert short_names(["net.a.0:channels", "net.a.0:channels#2"]) == ["a.0", "a.0#2"]
