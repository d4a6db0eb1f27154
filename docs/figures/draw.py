"""Draw the figures of the README and of these pages.

The two charts take their numbers from the tables of ``docs/measured.md`` and hold them in the file, so that a test can
say whether a figure is out of date; the schemes hold no numbers. Lines and bars differ by stroke, marker and hatching:
they can be told apart in black and white. Run

    python docs/figures/draw.py
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
MEASURED = HERE.parent / "measured.md"

BLACK, GREY, LIGHT, PALE = "#111111", "#6b6b6b", "#b5b5b5", "#e8e8e8"

Table = list[list[str]]


def table_after(heading: str, text: str) -> Table:
    """Return the cells of the first table below a heading, without the line under its head.

    Args:
        heading: The heading, without its marks.
        text: The page.

    Returns:
        The rows, the head first.

    Raises:
        ValueError: If there is no table.
    """
    below = re.split(rf"^## {re.escape(heading)}$", text, maxsplit=1, flags=re.M)[1]
    block = re.search(r"(?:^\|.*\n)+", below, flags=re.M)
    if block is None:
        raise ValueError(f"expected a table below {heading!r} in {MEASURED}, found none")
    rows = [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in block[0].splitlines()]
    return [row for i, row in enumerate(rows) if i != 1]


def accuracy_numbers(text: str) -> dict[str, dict[str, list[list[float]]]]:
    """Return the points of the first chart: share of the units kept and accuracy, by task and method."""
    head, *rows = table_after("Which criterion prunes best", text)
    numbers: dict[str, dict[str, list[list[float]]]] = {}
    for start in (1, 4):
        task, dense = re.match(r"(\S+), dense ([\d.]+): 20%", head[start]).groups()
        removed = [20, *(int(cell.strip("%")) for cell in head[start + 1 : start + 3])]
        numbers[task] = {
            re.split(r"[ `]", row[0], maxsplit=1)[0]: [
                [100, float(dense)],
                *([100 - r, float(cell)] for r, cell in zip(removed, row[start : start + 3], strict=True)),
            ]
            for row in rows
            if "with compensation" not in row[0]
        }
    return numbers


def latency_numbers(text: str) -> dict[str, list[float]]:
    """Return the bars of the second chart: MACs left, and time as a share of the dense model's, eager at batch 32."""
    head, *rows = table_after("Latency", text)
    column = head.index("batch 32, eager")
    return {row[0]: [float(cell.split("/")[0]) for cell in (row[1], row[column])] for row in rows}


def plain(axes: Axes) -> None:
    """Take the frame of a chart away, but for the two axes."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


STYLES = {
    "mask_ggn": (BLACK, "-", "o", "mask GGN, compensated"),
    "mask_fisher": (GREY, "--", "s", "mask Fisher"),
    "michel": (GREY, "-.", "^", "gradient masks"),
    "magnitude": (GREY, ":", "x", "magnitude"),
}
ONE_ANSWER = 68.4  # of MRPC, as the page says of it


def accuracy(numbers: dict[str, dict[str, list[list[float]]]]) -> Figure:
    """Draw accuracy against the share of heads and neurons that is kept."""
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.4), sharey=True)
    for axes, (task, lines) in zip(panels, numbers.items(), strict=True):
        for name, points in lines.items():
            color, stroke, marker, label = STYLES[name]
            width = 2.4 if name == "mask_ggn" else 1.4
            axes.plot(
                *zip(*points, strict=True), color=color, ls=stroke, marker=marker, lw=width, ms=5, label=label, zorder=3
            )
        axes.set_title(task, fontsize=11, fontweight="bold", loc="left")
        axes.set_xlim(103, 37)
        axes.set_xticks([100, 80, 60, 40], ["all", "80%", "60%", "40%"])
        axes.set_xlabel("heads and neurons kept")
        axes.grid(axis="y", color=PALE, zorder=0)
        plain(axes)
    panels[0].set_ylabel("accuracy, %")
    panels[0].set_ylim(45, 90)
    panels[1].legend(frameon=False, loc="lower left", fontsize=9, handlelength=3.2)
    panels[0].axhline(ONE_ANSWER, color=BLACK, lw=0.7)
    panels[0].text(80, ONE_ANSWER - 2.2, "always the same answer", fontsize=8)
    figure.suptitle("A fine-tuned MiniLM right after pruning, before any further training", fontsize=11, y=1.04)
    return figure


def latency(numbers: dict[str, list[float]]) -> Figure:
    """Draw time as a share of the dense model's beside the share of multiply-accumulates that is left."""
    figure, axes = plt.subplots(figsize=(7.2, 2.9))
    for row, (macs, time) in enumerate(numbers.values()):
        axes.barh(row - 0.19, macs, 0.34, color="white", edgecolor=BLACK, hatch="////", lw=0.8, zorder=3)
        axes.barh(row + 0.19, time, 0.34, color=GREY, edgecolor=BLACK, lw=0.8, zorder=3)
        axes.text(macs + 0.01, row - 0.19, f"{macs:.2f}", va="center", fontsize=8)
        axes.text(time + 0.01, row + 0.19, f"{time:.2f}", va="center", fontsize=8)
    axes.barh(-9, 0, color="white", edgecolor=BLACK, hatch="////", label="multiply-accumulates left")
    axes.barh(-9, 0, color=GREY, edgecolor=BLACK, label="time left, batch of 32, one CPU thread")
    axes.axvline(1, color=BLACK, lw=1)
    axes.text(1, -0.62, "dense", ha="center", fontsize=8)
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    axes.set_yticks(range(len(numbers)), list(numbers))
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("share of the dense model's")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1.06), ncols=2)
    plain(axes)
    return figure


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure without axes, whose units are its inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str = "", **style: object) -> None:
    """Draw a box with text in its middle."""
    settings = {"facecolor": "white", "edgecolor": BLACK, "lw": 1.1} | style
    axes.add_patch(Rectangle((x, y), width, height, **settings))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=BLACK, lw=1.1))


def steps() -> Figure:
    """Draw the steps, and which of the two halves they belong to."""
    figure, axes = blank(10.0, 2.6)
    texts = (
        "a trained model\nand batches",
        "discover\nwhat can go\nwhole",
        "score\nwhat each unit\nis worth",
        "choose\nkeep, implant,\nremove",
        "compensate\nlet the rest\nmake up for it",
        "cut\nsmaller tensors",
        "a smaller model,\nsame class",
    )
    width, gap = 1.22, 0.2
    for i, text in enumerate(texts):
        x = 0.1 + i * (width + gap)
        end = i in {0, len(texts) - 1}
        box(axes, x, 1.1, width, 0.95, text, facecolor=PALE if end else "white")
        if i:
            arrow(axes, (x - gap, 1.57), (x, 1.57))
    for first, last, name, note in ((1, 4, "decide", "changes nothing"), (5, 5, "carry_out_", "in place")):
        left, right = 0.1 + first * (width + gap), 0.1 + last * (width + gap) + width
        axes.plot([left, left, right, right], [0.98, 0.86, 0.86, 0.98], color=BLACK, lw=1.1)
        axes.text((left + right) / 2, 0.6, name, ha="center", family="monospace", fontsize=10)
        axes.text((left + right) / 2, 0.36, note, ha="center", fontsize=9, color=GREY)
    left, right = 0.1 + width + gap, 0.1 + 5 * (width + gap) + width
    axes.plot([left, left, right, right], [2.17, 2.29, 2.29, 2.17], color=BLACK, lw=1.1)
    axes.text((left + right) / 2, 2.42, "prune, HessianPruner", ha="center", family="monospace", fontsize=10)
    return figure


GONE = (1, 3)


def matrix(axes: Axes, x: float, y: float, name: str, *, rows: bool, after: bool) -> None:
    """Draw a weight matrix of four heads, in rows or in columns; those that go are hatched."""
    heads = [h for h in range(4) if not (after and h in GONE)]
    size, other = 0.24, 0.96
    width, height = (other, size * len(heads)) if rows else (size * len(heads), other)
    y += (0.96 - height) / 2
    for i, head in enumerate(heads):
        hatch = "//////" if head in GONE else None
        place = (x, y + height - size * (i + 1), other, size) if rows else (x + size * i, y, size, other)
        axes.add_patch(
            Rectangle(place[:2], *place[2:], facecolor="white" if hatch else PALE, edgecolor=BLACK, lw=0.8, hatch=hatch)
        )
        if not hatch:
            axes.text(place[0] + place[2] / 2, place[1] + place[3] / 2, str(head), ha="center", va="center", fontsize=7)
    axes.text(x + width / 2, y + height + 0.1, name, ha="center", fontsize=9)


def unit() -> Figure:
    """Draw what an attention head is: rows of three matrices and columns of a fourth, before and after."""
    figure, axes = blank(9.6, 2.5)
    for left, after, title in ((0.15, False, "before: heads 1 and 3 shall go"), (5.3, True, "after")):
        axes.text(left, 2.25, title, fontsize=10, fontweight="bold")
        for i, name in enumerate(("query", "key", "value")):
            matrix(axes, left + i * 1.08, 0.75, name, rows=True, after=after)
        matrix(axes, left + 3.45, 0.75, "output", rows=False, after=after)
    axes.text(0.15 + 1.55, 0.42, "a head's rows make it ...", ha="center", fontsize=9, color=GREY)
    axes.text(0.15 + 3.05, 0.42, "... and its columns read it", ha="left", fontsize=9, color=GREY)
    axes.text(5.3 + 2.1, 0.42, "num_attention_heads: 4 -> 2", ha="center", family="monospace", fontsize=9, color=GREY)
    return figure


def ranking() -> Figure:
    """Draw all units in one ranking, and where it is cut."""
    figure, axes = plt.subplots(figsize=(8.6, 2.9))
    heights = [0.02 + (i / 31) ** 2.2 for i in range(32)]
    removed, implanted = 11, 5
    for i, height in enumerate(heights):
        style = (
            {"color": "white", "hatch": "//////"}
            if i < removed
            else {"color": LIGHT}
            if i < removed + implanted
            else {"color": GREY}
        )
        axes.bar(i, height, 0.82, edgecolor=BLACK, lw=0.7, yerr=0.03 + height / 14, ecolor=BLACK, capsize=1.5, **style)
    for place in (removed - 0.5, removed + implanted - 0.5):
        axes.axvline(place, color=BLACK, lw=1, ls="--")
    for middle, text in ((5, "removed"), (13, "implanted"), (23.5, "kept")):
        axes.text(middle, 1.12, text, ha="center", fontsize=10)
    axes.set_ylim(0, 1.25)
    axes.set_xlim(-0.8, 31.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("all units of all layers, least sensitive first")
    axes.set_ylabel("sensitivity,\nwith its error")
    plain(axes)
    return figure


def draw(folder: Path) -> None:
    """Draw every figure.

    Args:
        folder: Where to.
    """
    text = MEASURED.read_text(encoding="utf-8")
    charts: dict[str, tuple[Callable[..., Figure], object]] = {
        "accuracy": (accuracy, accuracy_numbers(text)),
        "latency": (latency, latency_numbers(text)),
        "steps": (steps, None),
        "unit": (unit, None),
        "ranking": (ranking, None),
    }
    style = {"svg.hashsalt": "hap_hf", "svg.fonttype": "path", "font.size": 10, "hatch.linewidth": 0.6}
    with mpl.rc_context(style):
        for name, (make, numbers) in charts.items():
            figure = make(numbers) if numbers is not None else make()
            # No date: a figure that says the same is the same file.
            described = {"Date": None, "Creator": None, "Description": json.dumps(numbers)}
            figure.savefig(folder / f"{name}.svg", metadata=described, bbox_inches="tight", facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="where to; by default beside this script")
    draw(parser.parse_args().folder)
