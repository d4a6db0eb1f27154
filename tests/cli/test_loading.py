"""A model without what it needs is refused in one line, before its data is looked at."""

import json

import pytest
import transformers
from on_disk import save_data, save_model, tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from hap_hf.cli.app import app
from hap_hf.cli.loading import load, processor_of
from hap_hf.cli.setup import Given, set_up
from hap_hf.cli.tasks import TASKS
from hap_hf.errors import ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("bert", "bare", "several", "damaged"):
        save_model("text-classification", folder / name)
    for file in (folder / "bare").glob("tokenizer*"):
        file.unlink()
    config = json.loads((folder / "several" / "config.json").read_text(encoding="utf-8"))
    changed = {**config, "problem_type": "multi_label_classification"}
    (folder / "several" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    save_data("text-classification", folder)
    return folder


DATA = ["--data", "{folder}/train.csv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "bare", *DATA, "--out", "{folder}/x"], "has no tokenizer"),
        (["export", "bare", *DATA, "--out", "{folder}/x.pt2", "--format", "pt2"], "has no tokenizer"),
        (["export", "bare", "--out", "{folder}/x.pt2", "--format", "pt2"], "has no tokenizer"),
        (["prune", "several", *DATA, "--out", "{folder}/x"], "multi_label_classification, and the command line"),
        (["prune", "damaged", *DATA, "--out", "{folder}/x"], "the weights of {folder}/damaged are damaged"),
        (["prune", "bert/config.json", *DATA, "--out", "{folder}/x"], "is a file; name the folder that holds"),
        (
            ["prune", "bert", *DATA, "--out", "{folder}/x", "--task", "image-classification"],
            "the type 'bert' for it",
        ),
    ],
)
def test_what_is_missing_is_one_line_and_leaves_nothing(words, message, models):
    command, model, *rest = (word.format(folder=models) for word in words)
    done = CliRunner().invoke(app, [command, str(models / model), *rest])
    assert done.exit_code == 1, done.output + repr(done.exception)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message.format(folder=models) in done.stderr
    assert not list(models.glob("x*"))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "roberta"])
def test_a_tokenizer_without_words_is_none(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 200  # what transformers makes of nothing
    with pytest.raises(ConfigError, match="has no tokenizer"):
        processor_of(str(tmp_path), TASKS["text-classification"])


def test_a_tokenizer_of_bytes_needs_no_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perceiver"}), encoding="utf-8")
    assert len(processor_of(str(tmp_path), TASKS["text-classification"])) > 256


def test_a_missing_package_is_named_with_its_extra(models, monkeypatch):
    def missing(name):
        raise ImportError(f"\nTimmWrapper of {name} requires the timm library but it was not found.\n")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", missing)
    with pytest.raises(ConfigError, match=r'not installed: pip install "hap_hf\[timm\]"'):
        load(str(models / "bert"), None)


def save_reader(folder, given):
    """Save a classifier that reads from left to right, whose config names no padding."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    given.save_pretrained(folder)
    return str(folder)


def test_a_classifier_knows_the_padding_of_its_tokenizer(models, tmp_path):
    setup = set_up(Given(save_reader(tmp_path, tokenizer()), str(models / "train.csv"), max_batches=1))
    assert setup.model.config.pad_token_id == 0
    assert setup.judge(setup.model) >= 0


def test_a_tokenizer_without_padding_is_told(models, tmp_path):
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(ConfigError, match="has no padding token, which batches of texts need"):
        set_up(Given(save_reader(tmp_path, bare), str(models / "train.csv")))
