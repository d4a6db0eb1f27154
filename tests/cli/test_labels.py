"""Labels of data become the model's classes by name, and what is none is told."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, List
from PIL import Image
from transformers import BertConfig, ViTConfig, ViTForImageClassification

from hap_hf.cli.labels import classes_of
from hap_hf.cli.setup import Given, set_up
from hap_hf.errors import ConfigError


def classes(model, data, labels):
    """Return what labels become in a model with some names, given those of the data."""
    kind = data if data is None else ClassLabel(names=data)
    rows = Dataset.from_dict({"label": labels})
    config = BertConfig(num_labels=model) if isinstance(model, int) else BertConfig(id2label=dict(enumerate(model)))
    class_of = classes_of(rows if kind is None else rows.cast_column("label", kind), "label", config)
    return [class_of(label) for label in labels]


@pytest.mark.parametrize(
    ("model", "data", "labels", "expected"),
    [
        (["dog", "cat"], ["cat", "dog"], [0, 1, 1], [1, 0, 0]),
        (["POSITIVE", "Not_same"], ["not same", "positive"], [0, 1], [1, 0]),
        (["dog", "cat", "fox"], ["fox", "cat"], [0, 1], [2, 1]),
        (["crane", "cat", "crane"], ["crane", "cat", "crane bird"], [0, 1], [0, 1]),
        (11, [*map(str, sorted(range(11), key=str))], [0, 1, 2, 3], [0, 1, 10, 2]),
        (["one", "two"], ["1", "0"], [0, 1], [1, 0]),
        (2, ["cat", "dog"], [0, 1], [0, 1]),
        (["dog", "cat"], None, [0, 1], [0, 1]),
        (["dog", "cat"], None, ["cat", "Dog", "0"], [1, 0, 0]),
        (2, None, [0.0, True], [0, 1]),
        (1, None, [0.37, 2], [0.37, 2.0]),
    ],
)
def test_classes_go_by_name_where_both_sides_have_names(model, data, labels, expected):
    assert classes(model, data, labels) == expected


@pytest.mark.parametrize(
    ("model", "data", "labels", "message"),
    [
        (
            ["dog", "cat"],
            ["cat", "wolf"],
            [0, 1],
            r"knows the classes \['dog', 'cat'\].* has 'wolf' of",
        ),
        (["dog", "cat"], None, ["wolf"], "has 'wolf'; name another column by --label-column"),
        (["dog", "cat"], None, [2], "and column 'label' has 2;"),
        (2, ["a", "b", "c"], [2], "has 'c' of"),
        (2, None, [0.37], "the number or the name of a class in column 'label', got 0.37"),
        (2, None, [None, 1], "a number as label in each row of column 'label', got None"),
        (2, ["a", "b"], [-1], "judge by another split with --held-out"),
        (2, None, [-1], "judge by another split with --held-out"),
        (2, None, [[0.0, 1.0]], "one label a row in column 'label'.*hap_hf.prune"),
        (1, None, ["much"], "a number as label in each row of column 'label', got 'much'"),
    ],
)
def test_what_is_no_class_of_the_model_is_told(model, data, labels, message):
    with pytest.raises(ConfigError, match=message):
        classes(model, data, labels)


def test_tags_of_words_go_by_name():
    rows = Dataset.from_dict({"tags": [[0, 1]]}).cast_column("tags", List(ClassLabel(names=["B-PER", "O"])))
    class_of = classes_of(rows, "tags", BertConfig(id2label={0: "O", 1: "B-PER"}))
    assert [class_of(tag) for tag in rows[0]["tags"]] == [1, 0]


def test_a_folder_of_images_is_matched_with_the_names_of_the_model(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(image_size=8, patch_size=4, id2label={0: "dog", 1: "cat"}, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    setup = set_up(Given(str(tmp_path / "model"), str(tmp_path / "data")))
    assert setup.samples
    assert all(s["labels"] == (s["pixel_values"].mean() > 0).logical_not().item() for s in setup.samples)
