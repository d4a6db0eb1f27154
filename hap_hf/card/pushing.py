"""The card and the report go along wherever a pruned model is pushed."""

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hap_hf.card.facts import CardFacts
from hap_hf.card.write import write_card
from hap_hf.checkpoint.host import check_at_upload

_WRAPPED = "__card_by_hap_hf__"


def add_card(model: PreTrainedModel, folder: Path, repo_id: str) -> None:
    """Write the card and the report of a model that is about to be uploaded; of one that was not pruned, nothing.

    Args:
        model: The model.
        folder: What will be uploaded.
        repo_id: To where.
    """
    facts = CardFacts.of(model)
    if facts is None:
        return
    if facts.report is not None:
        facts.report.save(folder)
    write_card(facts, folder, repo_id)


def let_trainer_add_card(trainer: Any) -> None:
    """Let a Trainer's own card of a pruned model have the section about pruning.

    Args:
        trainer: The Trainer.
    """
    create = trainer.create_model_card
    if hasattr(create, _WRAPPED):
        return

    @functools.wraps(create)
    def both(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        facts = CardFacts.of(trainer.accelerator.unwrap_model(trainer.model))
        if facts is not None and trainer.is_world_process_zero():
            write_card(facts, trainer.args.output_dir, trainer.hub_model_id or "")

    setattr(both, _WRAPPED, True)
    trainer.create_model_card = both


check_at_upload(add_card)
