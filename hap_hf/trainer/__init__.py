"""Pruning inside the Hugging Face ``Trainer``: when to call the pipeline, nothing about how."""

from hap_hf.trainer.callback import HessianPruner
from hap_hf.trainer.distill import Distill
from hap_hf.trainer.floor import Floor
from hap_hf.trainer.growing import GrowingReg
from hap_hf.trainer.scoring import scoring_batches, trainer_loss

__all__ = ["Distill", "Floor", "GrowingReg", "HessianPruner", "scoring_batches", "trainer_loss"]
