"""Write ``docs/settings.md`` from what the settings say of themselves.

What a setting means, its default and its values stand in the code; the order and the advice stand here. Run

    python docs/gen_settings.py

A test says so if the page is out of date.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from hap_hf import Criterion, Distill, Floor, GrowingReg, HapConfig, HessianPruner, known_criteria
from hap_hf.names.group import Kind
from hap_hf.names.targets import AMOUNTS

PAGE = Path(__file__).with_name("settings.md")

HEAD = """# Settings

You know what you want and look for the setting that does it. This page is written by `docs/gen_settings.py` from the
code's own words; `HapConfig.help()` returns the same texts.

| I want to | write |
|---|---|
| keep half of the prunable parameters | `HapConfig(target_params=0.5)` |
| keep half of the prunable multiply-accumulates | `HapConfig(target_macs=0.5)` |
| keep half of all parameters, embeddings included | `HapConfig(target_model_params=0.5)` |
| remove 30% of the heads, neurons and channels | `HapConfig(prune_ratio=0.3)` |
| prune neurons only, or heads only | `kinds="ffn"`, `kinds="heads"` |
| prune the last two of twelve layers only | `include=["*layer.10.*", "*layer.11.*"]` |
| leave the first two layers alone | `exclude=["*layer.0.*", "*layer.1.*"]` |
| keep more of one part, or of one kind | `target_params=0.5, parts={"vision*": 0.8, "heads": 0.7}` |
| have [equally wide layers](checkpoints-and-the-hub.md#plain-checkpoints) | `target_params=0.5, equal_widths=True` |
| have widths that hardware likes | `round_to=8` |
| split the result over four devices by tensor parallelism | `shards=4` |
| implant the better third of what is cut | `implant_ratio=0.3` |
| low-rank paths beside blocks where they pay | `implants="auto"` |
| the paper's method | `method=Hessian(num_probes=300, coupling="filter")` |
| a quick look, without gradients | `method="magnitude"` |
| score on more data | `max_batches=32` |
| other random signs than those of seed 0 | `seed=1` |
| no progress bars | `progress=False` |

Settings that contradict each other, or that nothing would read, are errors when the config is made. A config is frozen;
`dataclasses.replace(config, seed=1)` returns a changed one. `to_dict` and `from_dict` take it to JSON and back.
"""

SECTIONS = {
    "How much": (*AMOUNTS, "parts"),
    "Of what": ("kinds", "include", "exclude", "max_group_ratio", "round_to", "shards", "equal_widths"),
    "How it is scored": ("method", "num_passes", "per_cost", "compensate"),
    "What stands in for units": ("implants", "implant_ratio", "implant_cost", "implant_init"),
    "What it is measured on": ("max_batches", "precision", "seed", "recalibrate", "progress"),
}

NOTES = {
    "How much": """Exactly one of these, beside `parts`. `target_model_params` and `target_model_macs` are shares of the
whole model, and all others of the prunable part: of the groups that `kinds`, `include` and `exclude` leave.
**`prune_ratio` says what goes; the others say what stays.**""",
    "Of what": """A group is named after the module that holds it and its kind, as in `bert.encoder.layer.0:ffn`.
`hap_hf.find_groups(model, batch)` lists them.""",
}


def code(value: Any) -> str:
    """Return a default as people would write it."""
    if isinstance(value, Criterion):
        return f"`{value.name!r}`"
    if isinstance(value, tuple):
        return "all" if value == tuple(Kind) else f"`{value!r}`"
    return f"`{(value.value if isinstance(value, StrEnum) else value)!r}`"


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def table(rows: Iterable[tuple[str, ...]], *head: str) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sections() -> str:
    """Return a table for each group of settings; those that nobody sorted come last."""
    fields = {f.name: f for f in dataclasses.fields(HapConfig)}
    sorted_ones = {name for names in SECTIONS.values() for name in names}
    wanted = {**SECTIONS, "Others": tuple(n for n in fields if n not in sorted_ones)}
    help_of = HapConfig.help()
    text = ""
    for title, names in wanted.items():
        if names:
            rows = [(f"`{n}`", code(fields[n].default), cell(help_of[n])) for n in names]
            text += f"\n## {title}\n\n" + (f"{NOTES[title]}\n\n" if title in NOTES else "")
            text += table(rows, "setting", "default", "what it means")
    return text


def criteria_tables() -> str:
    """Return what each criterion does by default, and what the settings of all of them mean."""
    known = [c for _, c in sorted(known_criteria().items()) if c.__module__.startswith("hap_hf.")]
    yes = {True: "yes", False: ""}
    rows: list[tuple[str, ...]] = []
    meanings: dict[tuple[str, str, str], list[str]] = {}
    for c in known:
        own = dataclasses.fields(c)
        names = ", ".join(f"`{f.name}`" for f in own)
        rows.append((f"`{c.name}`", f"`{c.__name__}`", names, str(c.passes), yes[c.per_cost], yes[c.compensates]))
        for f in own:
            meanings.setdefault((f.name, code(f.default), cell(f.metadata["help"])), []).append(c.name)
    text = """
## Criteria

`method="hessian"` takes a criterion with its defaults. `method=Hessian(num_probes=32)` sets its own settings, with the
class from `hap_hf`. [How it works](how-it-works.md#2-score-what-each-unit-is-worth) says what each one is and costs.

"""
    text += table(rows, "name", "class", "settings", "passes", "per cost", "compensates")
    text += """
The last three columns are what happens unless `num_passes`, `per_cost` and `compensate` say otherwise. `magnitude` and
`random` look at no batch. A criterion of your own is one class: see [extending](extending.md#a-criterion).

"""
    each = [
        (f"`{name}`", default, ", ".join(f"`{o}`" for o in owners), help)
        for (name, default, help), owners in meanings.items()
    ]
    return text + table(each, "setting", "default", "of", "what it means")


def arguments_of(thing: type) -> dict[str, str]:
    """Return what a Google docstring says of each argument."""
    doc = inspect.getdoc(thing) or ""
    block = re.split(r"^Args:\n", doc, maxsplit=1, flags=re.M)[1].split("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", block, flags=re.M)
    return {name: re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text.replace("``", "`")) for name, text in found}


def arguments_table(thing: type) -> str:
    """Return a table of the arguments of a callback."""
    parameters, said = inspect.signature(thing.__init__).parameters, arguments_of(thing)
    rows = [
        (f"`{n}`", "" if p.default is inspect.Parameter.empty else code(p.default), cell(said[n]))
        for n, p in parameters.items()
        if n != "self"
    ]
    return table(rows, "argument", "default", "what it means")


def callback_tables() -> str:
    """Return tables of the arguments of the callbacks."""
    floor = [(f"`{f.name}`", code(f.default), cell(f.metadata["help"])) for f in dataclasses.fields(Floor)]
    growing = [(f"`{f.name}`", code(f.default), cell(f.metadata["help"])) for f in dataclasses.fields(GrowingReg)]
    return (
        "\n## The callback\n\n"
        "`HessianPruner(config, ...)` prunes once, before the first step, unless `step` or `epoch` say otherwise.\n"
        f"[In the Trainer](in-the-trainer.md) has examples.\n\n{arguments_table(HessianPruner)}"
        "\n`floor=Floor(...)`, or a number, which is its drop:\n\n"
        f"{table(floor, 'setting', 'default', 'what it means')}"
        "\n## What helps to recover\n\n"
        "[Recovering](recovering.md) says how to use them. `regularise=GrowingReg(...)`:\n\n"
        f"{table(growing, 'setting', 'default', 'what it means')}"
        f"\n`Distill(...)`:\n\n{arguments_table(Distill)}"
    )


def page() -> str:
    """Return the whole page."""
    return HEAD + sections() + callback_tables() + criteria_tables()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
