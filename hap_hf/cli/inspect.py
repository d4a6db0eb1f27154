"""``hap-hf inspect``: what was removed, where, and what is left, from names and headers alone."""

from typing import Annotated, Any

import typer

from hap_hf.checkpoint.headers import Header, read_header
from hap_hf.cli import options
from hap_hf.cli.told import say, told
from hap_hf.errors import ConfigError
from hap_hf.names.outcome import footprint, whole
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.names.targets import AMOUNTS
from hap_hf.report.tables import plain_text
from hap_hf.report.words import counts, exact


@told
def inspect(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint: a folder, or a name on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: options.Json = False,
) -> None:
    """Say what was removed, where, and what is left. No weights are loaded, and from the Hub only headers are read."""
    header = read_header(model, revision)
    if header.plan is None:
        raise ConfigError(f"{model} carries no plan of hap_hf: it is a dense model, a plain checkpoint, or no model")
    say(as_json, _values(header), _text(header))


def _dense(header: Header) -> int:
    """Return the parameters before all stages: those that are there, and what each stage took."""
    gone = 0.0
    plan = header.plan or PruningPlan(())
    for stage, bypasses in zip(plan.stages, plan.bypasses, strict=True):
        gone += footprint(whole(g.group for g in stage)).params - footprint(stage, bypasses).params
    return round(header.params + gone)


def _values(header: Header) -> dict[str, Any]:
    plan = header.plan or PruningPlan(())
    return {
        "class": header.architecture,
        "parameters": header.params,
        "parameters before": _dense(header),
        "bytes": header.num_bytes,
        "stages": [
            {
                "settings": origin.get("settings", {}),
                "groups": [
                    {
                        "name": g.group.name,
                        "kind": g.group.kind.value,
                        "units": g.group.num_units,
                        "kept": g.units("k"),
                        "implanted": g.units("i"),
                        "removed": g.units("p"),
                    }
                    for g in stage
                ],
                "bypasses": [{"layer": b.exit, "rank": b.rank} for b in bypasses],
            }
            for stage, origin, bypasses in zip(plan.stages, plan.provenance, plan.bypasses, strict=True)
        ],
    }


def _text(header: Header) -> str:
    plan = header.plan
    rows = [
        (
            f"{number}. {g.group.name}" if plan and len(plan.stages) > 1 else g.group.name,
            f"{g.group.kind.value} {counts(g.group.num_units, g.kept, g.implanted)}",
            _ranges(g),
        )
        for number, stage in enumerate(plan.stages if plan else (), 1)
        for g in stage
    ]
    facts = [
        ("class", header.architecture),
        ("parameters", exact(_dense(header), header.params)),
        ("weights", f"{header.num_bytes / 1e6:,.1f} MB"),
    ]
    for number, bypasses in enumerate(plan.bypasses if plan else (), 1):
        if bypasses:
            ranks = sorted(b.rank for b in bypasses)
            facts.append((f"bypasses of stage {number}", f"{len(ranks)} of rank {ranks[0]} to {ranks[-1]}"))
    for number, origin in enumerate(plan.provenance if plan else (), 1):
        settings = origin.get("settings", {})
        if isinstance(settings, dict):
            asked = (*AMOUNTS, "implant_ratio", "method")
            words = [f"{name}={_short(settings[name])}" for name in asked if settings.get(name) not in (None, 0, 0.0)]
            facts.append((f"settings of stage {number}", ", ".join(words)))
    return plain_text(facts, ("group", "units", "removed"), rows)


def _short(value: Any) -> str:
    what = value.get("what") if isinstance(value, dict) else None
    if isinstance(what, dict):  # an amount
        return f"{what.get('name')} {value.get('keep')}"[:60]
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)[:60]


def _ranges(plan: GroupPlan, most: int = 8) -> str:
    """Return the removed units in runs, as in ``0-3, 7``."""
    runs: list[list[int]] = []
    for unit in plan.units("p"):
        if runs and unit == runs[-1][-1] + 1:
            runs[-1][1:] = [unit]
        else:
            runs.append([unit])
    words = ["-".join(map(str, run)) for run in runs]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more runs" if len(words) > most else "")
