"""Training after pruning."""

import contextlib
import sys
import tempfile

import torch
import transformers

from hap_hf.cli.setup import Setup
from hap_hf.errors import ConfigError


def recover(setup: Setup, *, epochs: float, learning_rate: float, batch_size: int, seed: int) -> None:
    """Train the model of a set-up on its samples, with the Trainer's defaults.

    Args:
        setup: The model and the samples.
        epochs: How long.
        learning_rate: At the beginning.
        batch_size: Samples of a batch.
        seed: Of their order.

    Raises:
        ConfigError: If the loss is no number after it.
    """
    with tempfile.TemporaryDirectory() as folder:  # the Trainer makes one, and has nothing to write to it
        arguments = transformers.TrainingArguments(
            folder,
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
        trainer = transformers.Trainer(setup.model, arguments, train_dataset=setup.samples, data_collator=setup.collate)
        trainer.remove_callback(transformers.PrinterCallback)
        with contextlib.redirect_stdout(sys.stderr):  # the bar's last line; results alone belong on the other
            trainer.train()
    model = setup.model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        loss = model(**{name: value.to(device) for name, value in setup.batches[0].items()}).loss
    if not bool(loss.isfinite().all()):
        raise ConfigError(
            f"training with --learning-rate {learning_rate:g} left a model whose loss is {loss.item():g}, and "
            "nothing was saved; choose a lower one"
        )
