"""Ordinary bad data is one line that says what is wrong with it; what can be read is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from on_disk import save_data, save_model, tokenizer
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from typer.testing import CliRunner

from hap_hf.cli.app import app
from hap_hf.cli.data import rows_of
from hap_hf.cli.setup import Given, set_up
from hap_hf.cli.tasks import TASKS
from hap_hf.errors import ConfigError

TEXT, TAGS, ANSWERS, CLAUSES = "text-classification", "token-classification", "question-answering", "text-generation"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for task in TASKS:
        save_model(task, folder / task)
    return folder


def csv(*rows):
    return "\n".join(["text,label", *rows])


def lines(**row):
    return "\n".join([json.dumps(row)] * 5)


ASKED = {"question": "w1", "context": "w1 w2 w3"}
FILES = [
    (TEXT, "empty.csv", "", "is empty"),
    (TEXT, "empty.txt", "", "is empty"),
    (TEXT, "header.csv", csv(), "has no rows"),
    (TEXT, "ragged.csv", csv("w1,1", "w2,w3,0"), "cannot be read as data .*Expected 2 fields in line 3, saw 3"),
    (TEXT, "latin.csv", csv("w1,1", "bäd,1").encode("latin-1"), "expected a table with names of columns in UTF-8"),
    (TEXT, "binary.csv", bytes(range(256)), "cannot be read as data"),
    (TEXT, "half.json", '[{"text": "w1', "cannot be read as data"),
    (TEXT, "numbers.csv", csv(*[f"{i},1" for i in range(5)]), "expected a text in each row of column 'text', got"),
    (TEXT, "no_text.csv", csv(*[",1"] * 4, "w1,0"), "expected a text in each row of column 'text', got None"),
    (TEXT, "no_label.csv", csv(*["w1,"] * 4, "w1,0"), "a number as label in each row of column 'label', got"),
    (
        TAGS,
        "few.jsonl",
        lines(tokens=["w1", "w2"], ner_tags=[0]),
        r"a tag in column 'ner_tags' for each word .*got \[0\]",
    ),
    (TAGS, "words.jsonl", lines(tokens="w1 w2", ner_tags=[0]), "a list of words in each row of column 'tokens'"),
    (
        ANSWERS,
        "list.jsonl",
        lines(**ASKED, answers=[{"text": "w1", "answer_start": 0}]),
        "expected answers as in SQuAD",
    ),
    (
        ANSWERS,
        "half.jsonl",
        lines(**ASKED, answers={"text": ["w1"], "answer_start": []}),
        "expected answers as in SQuAD",
    ),
    (ANSWERS, "named.jsonl", lines(text="w1", label=1), "the columns question, context, answers, as in SQuAD, got"),
    (CLAUSES, "numbers.jsonl", lines(text=1), "expected a text in each row of column 'text', got 1"),
    ("image-classification", "paths.csv", "image,label\n" + "a.png,1\n" * 5, "an image in each row .*got 'a.png'"),
]


@pytest.mark.parametrize(("task", "name", "written", "message"), FILES, ids=[f"{t[:5]}-{n}" for t, n, *_ in FILES])
def test_bad_data_is_told(task, name, written, message, models, tmp_path):
    (tmp_path / name).write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(ConfigError, match=message):
        set_up(Given(str(models / task), str(tmp_path / name)))


def test_bad_data_is_one_line_on_the_command_line(models, tmp_path):
    (tmp_path / "x.csv").write_text(csv("w1,1", "w2,w3,0"), encoding="utf-8")
    words = ["sweep", str(models / TEXT), "--data", str(tmp_path / "x.csv"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output + repr(done.exception)
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_question_that_leaves_no_room_is_told(models, tmp_path):
    row = {"question": "w1 w2 w3 w4 w5", "context": "w1", "answers": {"text": ["w1"], "answer_start": [0]}}
    (tmp_path / "long.jsonl").write_text(lines(**row), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no room for its context in 4 tokens .*; raise --max-length"):
        set_up(Given(str(models / ANSWERS), str(tmp_path / "long.jsonl"), max_length=4))


def test_a_folder_of_several_kinds_is_told(tmp_path):
    for split, file in (("train", "a.csv"), ("test", "a.json")):
        (tmp_path / split).mkdir()
        (tmp_path / split / file).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="a folder of files of one kind"):
        rows_of(str(tmp_path), held_out=None, seed=0)


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    save_data(TEXT, tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"the tokenizer makes the token .*, and the model has 20 tokens"):
        set_up(Given(str(tmp_path / "model"), str(tmp_path / "train.csv")))


def test_the_end_of_a_name_may_be_in_capitals(tmp_path):
    Path(save_data(TEXT, tmp_path)).rename(tmp_path / "UP.CSV")
    assert len(rows_of(str(tmp_path / "UP.CSV"), held_out=None, seed=0).train) == 32


def save_with_processor(folder):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=10, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def test_digits_are_for_any_image_classifier(tmp_path):
    setup = set_up(Given(save_with_processor(tmp_path), "digits", batch_size=4, max_batches=1, eval_samples=4))
    pixels = setup.batches[0]["pixel_values"]
    assert pixels.shape == (4, 3, 8, 8)
    assert pixels.min() == -1  # black, as the processor has it
    assert (pixels[:, 0] == pixels[:, 1]).all()
    assert setup.judge(setup.model) >= 0


def test_pictures_and_arrays_come_out_the_same(tmp_path):
    model = save_with_processor(tmp_path / "model")
    arrays = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    columns = [list(arrays), [Image.fromarray(a) for a in arrays]]
    found = []
    for i, column in enumerate(columns):
        Dataset.from_dict({"image": column, "label": list(range(6))}).save_to_disk(tmp_path / str(i))
        found.append(set_up(Given(model, str(tmp_path / str(i)))).samples)
    for array, picture in zip(*found, strict=True):
        assert array["labels"] == picture["labels"]
        assert (array["pixel_values"] == picture["pixel_values"]).all()


@pytest.mark.parametrize("image", [np.full((8, 8), 0.5), np.full((8, 8, 2), 3), np.full((8, 8), 300)])
def test_arrays_that_are_no_pictures_are_told(image, tmp_path):
    model = save_with_processor(tmp_path / "model")
    Dataset.from_dict({"image": [image.tolist()] * 5, "label": [0] * 5}).save_to_disk(tmp_path / "data")
    with pytest.raises(ConfigError, match="images of whole numbers from 0 to 255 with channels last"):
        set_up(Given(model, str(tmp_path / "data")))
