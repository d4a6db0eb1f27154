"""The model card of a pruned model, and the report beside it, wherever a model is pushed."""

from hap_hf.card.facts import CardFacts
from hap_hf.card.pushing import let_trainer_add_card
from hap_hf.card.write import write_card

__all__ = ["CardFacts", "let_trainer_add_card", "write_card"]
