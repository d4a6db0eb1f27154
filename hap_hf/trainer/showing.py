"""What a round did, in the Trainer's trackers: numbers by its log, pictures in TensorBoard, one line in the console."""

import importlib.util
import logging
from collections.abc import Generator
from contextlib import contextmanager

from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback  # type: ignore[attr-defined]

from hap_hf.report import PruningReport, details_of

logger = logging.getLogger(__name__)

_PRINTERS = (PrinterCallback, ProgressCallback)


def show(trainer: Trainer, report: PruningReport) -> None:
    """Log a round, so that every tracker of the Trainer shows it.

    Args:
        trainer: The Trainer.
        report: What the round did.
    """
    with _without_printing(trainer):
        trainer.log({**report.to_log(), **details_of(report)})
    if trainer.state.is_world_process_zero:
        _draw(trainer, report)


@contextmanager
def _without_printing(trainer: Trainer) -> Generator[None]:
    """Keep the Trainer's own callbacks that print from printing a hundred numbers; a line is written instead."""
    handler = trainer.callback_handler
    before = handler.callbacks
    # By their very types: what somebody derived from them may do more than print.
    handler.callbacks = [c for c in before if type(c) not in _PRINTERS]
    try:
        yield
    finally:
        handler.callbacks = before


def _draw(trainer: Trainer, report: PruningReport) -> None:
    """Add the pictures of a report to what TensorBoard shows, where it is used and matplotlib is there."""
    writers = [c.tb_writer for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
    if not any(writers) or importlib.util.find_spec("matplotlib") is None:
        return
    from hap_hf.plots import pictures_of

    try:
        for name, picture in pictures_of(report).items():
            for writer in filter(None, writers):
                writer.add_figure(f"hap/{name}", picture, trainer.state.global_step)
    except Exception as error:  # whatever a writer raises: the model is pruned, and a picture is no reason to stop
        logger.warning("no pictures in TensorBoard: %s: %s", type(error).__name__, error)
