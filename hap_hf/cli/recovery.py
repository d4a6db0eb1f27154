"""Training after pruning."""

import sys
from pathlib import Path

import transformers

from hap_hf.cli.setup import Setup


def recover(setup: Setup, out: Path, *, epochs: float, learning_rate: float, batch_size: int, seed: int) -> None:
    """Train the model of a set-up on its samples, with the Trainer's defaults.

    Args:
        setup: The model and the samples.
        out: Folder for what the Trainer writes; no checkpoints.
        epochs: How long.
        learning_rate: At the beginning.
        batch_size: Samples of a batch.
        seed: Of their order.
    """
    arguments = transformers.TrainingArguments(
        str(out),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    transformers.Trainer(setup.model, arguments, train_dataset=setup.samples, data_collator=setup.collate).train()
