"""The part of a card that is about pruning, in Markdown."""

from collections.abc import Iterator

from hap_hf.card.facts import CardFacts
from hap_hf.names.group import Kind
from hap_hf.names.plan import PruningPlan
from hap_hf.report import PruningReport
from hap_hf.report.words import counts, exact

BEGIN, END = "<!-- pruning: begin -->", "<!-- pruning: end -->"

_WHAT = """Units of {} that its loss can do without were removed by
[hap_hf](https://arxiv.org/abs/2101.08940), Hessian-aware structured pruning."""
_TITLES = {
    "widths": "Widths before and after",
    "heads": "Sensitivity of heads by layer",
    "threshold": "How sure the choice is",
}
_CAPTIONS = {
    "widths": "A bar for each layer: dark is kept, hatched a cheaper stand-in, white is gone.",
    "heads": """A mark for each head, the further right the more the loss would rise without it: circles are kept,
crosses are gone. The line through a mark is two standard errors to either side.""",
    "threshold": """All units in the order of their sensitivity. For those that are black other batches might have
decided otherwise; near the cut it matters little which of them go.""",
}
_LIMITS = """Without `import hap_hf` transformers stops at shapes that do not match. Programs that build models from
their config alone (vLLM, llama.cpp and others) cannot load this checkpoint. Scores and compensation come from a few
batches of the training data; what was not in them may have suffered more than the numbers above say."""
_CITATION = """```bibtex
@inproceedings{yu2022hessian,
  title={Hessian-Aware Pruning and Optimal Neural Implant},
  author={Yu, Shixing and Yao, Zhewei and Gholami, Amir and Dong, Zhen and Kim, Sehoon and Mahoney, Michael W and Keutzer, Kurt},
  booktitle={WACV},
  year={2022}
}
```"""  # noqa: E501 (one line an author list)


def section(facts: CardFacts, name: str) -> str:
    """Return the section.

    Args:
        facts: What to say.
        name: Where the model can be loaded from.

    Returns:
        Markdown between two comments, by which it is found again.
    """
    base = facts.base_on_the_hub
    link = f"[{base}](https://huggingface.co/{base})" if base else f"`{_plain(facts.base)}`"
    code = (
        "import hap_hf  # pip install hap_hf; needed before from_pretrained",
        f"from transformers import {facts.architecture}",
        "",
        f'model = {facts.architecture}.from_pretrained("{_plain(name)}")',
    )
    parts = [
        BEGIN,
        "## Pruning",
        _WHAT.format(link if facts.base else "a model"),
        "\n".join(["```python", *code, "```"]),
        "\n".join(_table(facts)),
        "\n".join(f"- {line}" for line in plan_in_words(facts.plan)),
        "\n\n".join(_pictured(picture) for picture in facts.pictures),
        "### Limits",
        _LIMITS,
        "### Citation",
        _CITATION,
        END,
    ]
    return "\n\n".join(part for part in parts if part)


def plan_in_words(plan: PruningPlan) -> list[str]:
    """Return a plan in a line for each kind of units.

    Args:
        plan: Any plan; of several stages the units before the first and after the last count.

    Returns:
        The lines.
    """
    lines = [f"in {len(plan.stages)} prunings, of which the table shows the last"] if len(plan.stages) > 1 else []
    # Of what has one unit left, or is left alone, later stages know nothing.
    first = {g.group.name: g for stage in reversed(plan.stages) for g in stage}
    last = {g.group.name: g for stage in plan.stages for g in stage}
    for kind in Kind:
        after = [g for g in last.values() if g.group.kind is kind]
        if after:
            widths = sorted(g.kept for g in after)
            before = sum(first[g.group.name].group.num_units for g in after)
            units = counts(before, sum(widths), sum(g.implanted for g in after))
            lines.append(
                f"{kind.value}: {units} in {len(after)} layers, {widths[0]:,} to {widths[-1]:,} of them in each"
            )
    return lines


def _pictured(picture: str) -> str:
    """Return a picture with what can be seen on it."""
    name = picture.partition(".")[0]
    shown = f"![{_TITLES.get(name, name)}]({picture})"
    return f"{shown}\n\n*{_CAPTIONS[name]}*" if name in _CAPTIONS else shown


def _table(facts: CardFacts) -> Iterator[str]:
    report = facts.report
    rows: list[tuple[str, str, str]] = []
    if report is not None:
        rows += _sizes(report)
    if "before" in facts.results:
        last = list(facts.results)[-1]
        rows.append((facts.metric, f"{facts.results['before']:.2%}", f"{facts.results[last]:.2%}"))
        if last != "after pruning" and "after pruning" in facts.results:
            rows.append((f"{facts.metric} before training again", "", f"{facts.results['after pruning']:.2%}"))
    if facts.latency is not None:
        rows.append((f"milliseconds a batch, {facts.latency[2]}", f"{facts.latency[0]:.1f}", f"{facts.latency[1]:.1f}"))
    if not rows:
        return
    yield "| | before | after |"
    yield "|---|---:|---:|"
    for name, before, after in rows:
        yield f"| {_plain(name)} | {before} | {after} |"


def _sizes(report: PruningReport) -> Iterator[tuple[str, str, str]]:
    for name, before, after in (
        ("parameters", report.before.params, report.after.params),
        ("multiply-accumulates a sample", report.before.macs, report.after.macs),
        ("prunable parameters", report.prunable_before.params, report.prunable_after.params),
    ):
        first, _, second = exact(before, after).partition(" -> ")
        yield name, first, second
    if report.loss_before is not None and report.loss_after is not None:
        yield "loss on the batches that were scored", f"{report.loss_before:.4g}", f"{report.loss_after:.4g}"


def _plain(text: str) -> str:
    """Return text that cannot leave its cell or its quotes."""
    return "".join(c for c in text if c.isprintable() and c not in '`|"<>\\')
