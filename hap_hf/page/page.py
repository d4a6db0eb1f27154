"""The page, put together of its template, its data and a table for browsers without JavaScript."""

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hap_hf.names.actions import IMPLANT, KEEP, decode_actions
from hap_hf.names.group import Kind
from hap_hf.names.shortened import short_names
from hap_hf.tradeoff import Tradeoff, TradeoffGroup, TradeoffPoint

_FLAGS = {
    "params": "--keep",
    "macs": "--target-macs",
    "model_params": "--target-model-params",
    "model_macs": "--target-model-macs",
}
_WORDS = {
    "params": "the prunable parameters",
    "macs": "the prunable multiply-accumulates",
    "model_params": "all parameters",
    "model_macs": "all multiply-accumulates",
}


def page_of(sweep: Tradeoff) -> str:
    """Return a page that shows a sweep: curves, and for an amount that is chosen by a slider what is left and where.

    Names in a sweep may be anybody's. They stand in the page as text: data is JSON in which no character can end its
    element, scripts set it as text, and a policy in the page lets a browser run no other script and load nothing.

    Args:
        sweep: What was measured.

    Returns:
        The HTML of one file.

    Raises:
        PlanFormatError: If the actions of a point are not those of the groups.
    """
    style, script = _read("page.css"), _read("page.js")
    title = f"{sweep.subject or 'A model'}: {sweep.metric} against size and time"
    told = [f"{len(sweep.points) - 1} amounts, chosen from one scoring, without training after pruning"]
    if sweep.machine:
        told.append(f"times on {sweep.machine}")
    parts = {
        "title": html.escape(title),
        "about": html.escape("; ".join(told) + "."),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "table": _table(sweep),
        "data": _json(_values(sweep)),
    }
    # In one go, so that nothing that was filled in is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def write_page(sweep: Tradeoff, path: str | os.PathLike[str]) -> None:
    """Write a page that shows a sweep.

    Args:
        sweep: What was measured.
        path: The file, which browsers open as it is.
    """
    Path(path).write_text(page_of(sweep), encoding="utf-8")


def _read(name: str) -> str:
    return (resources.files("hap_hf.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return a text's hash as a Content-Security-Policy names what may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(values: Any) -> str:
    """Return JSON that can stand inside a script element, which ends at what looks like its end."""
    text = json.dumps(values, allow_nan=False)  # ASCII, line separators included
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _values(sweep: Tradeoff) -> dict[str, Any]:
    """Return what the script of the page reads."""
    chosen = sweep.chosen()
    labels: dict[str, str] = {}
    for kind in Kind:
        names = [g.name for g in sweep.groups if g.kind == kind]
        labels |= dict(zip(names, short_names(names), strict=True))
    return {
        "metric": sweep.metric,
        "counted_in": _WORDS.get(sweep.counted_in, f"the prunable {sweep.counted_in}"),
        "flag": _FLAGS.get(sweep.counted_in, "--keep"),
        "chosen": None if chosen is None else sweep.points.index(chosen),
        "points": [_point(point, sweep.groups) for point in sweep.points],
        "groups": [
            {
                "name": group.name,
                "label": labels[group.name],
                "kind": group.kind,
                "units": group.units,
                "sensitivity": [_finite(v) for v in group.sensitivity],
                "error": [_finite(v) for v in group.error],
            }
            for group in sweep.groups
        ],
    }


def _point(point: TradeoffPoint, groups: Sequence[TradeoffGroup]) -> dict[str, Any]:
    numbers = ("keep", "params", "macs", "loss", "value", "milliseconds")
    result: dict[str, Any] = {name: _finite(getattr(point, name)) for name in numbers}
    widths: list[tuple[int, int]] = []
    heads: dict[int, str] = {}
    for place, group in enumerate(groups):
        letters = KEEP * group.units
        if group.name in point.actions:
            letters = decode_actions(point.actions[group.name], group.units, group.name)
        widths.append((letters.count(KEEP), letters.count(IMPLANT)))
        if group.sensitivity:
            heads[place] = letters
    return {**result, "widths": widths, "heads": heads}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _table(sweep: Tradeoff) -> str:
    """Return all numbers as a table."""
    head = ["prunable part kept", "parameters", "MACs a sample", "ms a batch", "loss"]
    head += [] if sweep.metric == "loss" else [sweep.metric]
    lines = ['<table class="numbers">', "<thead><tr>"]
    lines += [f'<th scope="col">{html.escape(word)}</th>' for word in head] + ["</tr></thead>", "<tbody>"]
    for point in sweep.points:
        name = "dense" if point is sweep.dense else f"{point.keep:.4g}"
        time = "" if point.milliseconds is None else f"{point.milliseconds:.2f}"
        cells = [f"{point.params:,.0f}", f"{point.macs:,.0f}", time, f"{point.loss:.4g}"]
        cells += (
            [] if sweep.metric == "loss" else [f"{point.value:.4f}" if sweep.higher_is_better else f"{point.value:.4g}"]
        )
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{row}</tr>')
    return "\n".join([*lines, "</tbody></table>"])
