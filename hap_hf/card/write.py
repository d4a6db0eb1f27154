"""Writing the card: a new one, or the section in one that is there."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from hap_hf.card.facts import CardFacts
from hap_hf.card.section import BEGIN, END, section

TAGS = ("hap_hf", "pruned", "structured-pruning", "arxiv:2101.08940")


def write_card(facts: CardFacts, folder: str | os.PathLike[str], name: str = "") -> Path:
    """Write the card of a pruned model to ``README.md``; in one that is there, the section about pruning is renewed.

    Args:
        facts: What to say.
        folder: Folder of the checkpoint.
        name: Where the model will be loaded from; by default the folder's name.

    Returns:
        The file.
    """
    file = Path(folder) / "README.md"
    card = ModelCard.load(file, ignore_metadata_errors=True) if file.is_file() else None
    name = name or Path(folder).resolve().name
    text = f"# {name}\n" if card is None else _without_section(card.text)
    data = _merged(card.data.to_dict() if card is not None else {}, facts, name)
    content = f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n\n{section(facts, name)}\n"
    file.write_text(content, encoding="utf-8")
    return file


def _without_section(text: str) -> str:
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", "", text, flags=re.S)


def _merged(known: dict[str, Any], facts: CardFacts, name: str) -> ModelCardData:
    """Return the metadata of a card with what pruning adds; what is there and contradicts nothing stays."""
    tags = [*(known.get("tags") or []), *TAGS]
    values = {**known, "library_name": "transformers", "tags": list(dict.fromkeys(tags))}
    if base := facts.base_on_the_hub:
        # The Hub knows adapters, finetunes, merges and quantized models: a pruned one was changed in its weights.
        values |= {"base_model": base, "base_model_relation": "finetune"}
    if facts.task:
        values["pipeline_tag"] = facts.task
    if facts.task and facts.data and facts.results:
        last = list(facts.results)[-1]
        # By the name of the kind of metric, which the Hub has a list of.
        kind = "exact_match" if facts.metric == "exact match" else "accuracy"
        own = EvalResult(
            task_type=facts.task,
            dataset_type=Path(facts.data).name,
            dataset_name=Path(facts.data).name,
            metric_type=kind,
            metric_name=facts.metric,
            metric_value=round(facts.results[last], 4),
        )
        model_name, others = _results(values.pop("model-index", None))
        values["model_name"] = model_name or name
        # What an earlier pruning into this folder was worth is no longer true.
        values["eval_results"] = [r for r in others if _what(r) != _what(own)] + [own]
    return ModelCardData(**values, ignore_metadata_errors=True)


def _results(index: Any) -> tuple[str, list[EvalResult]]:
    """Return the name and the results of a model index; nothing where it is none."""
    try:
        return model_index_to_eval_results(index)
    except (AttributeError, KeyError, TypeError, ValueError):
        return "", []


def _what(result: EvalResult) -> tuple[Any, ...]:
    return result.task_type, result.dataset_type, result.dataset_name, result.metric_type, result.metric_name
