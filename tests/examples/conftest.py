"""What the tests of the GLUE example share: a small BERT, and sentence pairs in files."""

from pathlib import Path

import pytest
from glue_data import build_model, pairs, write


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def mrpc(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mrpc")
    train, validation = write(pairs(), folder / "train.csv"), write(pairs(10, seed=1), folder / "validation.csv")
    return ["--task_name", "mrpc", "--train_file", str(train), "--validation_file", str(validation)]
