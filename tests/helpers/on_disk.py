"""Tiny models with tokenizers, and data for them, in files: what a command line starts from."""

import csv
import json
from pathlib import Path

import torch
from documented import NUM_TOKENS, bert, llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = [f"w{i}" for i in range(NUM_TOKENS - 4)]


def tokenizer():
    """Return a tokenizer of one token a word, with the two special ones that texts of pairs need."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def texts(number):
    """Return texts of words; those with a label of 1 have a late word of the vocabulary first."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(WORDS), (number, 6), generator=generator).tolist()
    return [[WORDS[i] for i in row] for row in picked], [int(row[0] >= len(WORDS) // 2) for row in picked]


def save_model(task, folder):
    """Save a tiny model of a task with what it needs to read its data."""
    torch.manual_seed(0)
    if task == "image-classification":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
        ).save_pretrained(folder)
        return folder
    sizes = bert().config
    sizes.num_labels = 2
    model = {
        "text-classification": bert,
        "token-classification": lambda: BertForTokenClassification(sizes),
        "question-answering": lambda: BertForQuestionAnswering(sizes),
        "text-generation": llama,
    }[task]()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_data(task, folder, number=40):
    """Save data of a task and return its name for ``--data``."""
    if task == "image-classification":
        return "digits"
    Path(folder).mkdir(exist_ok=True)
    words, labels = texts(number)
    if task == "text-classification":
        file = Path(folder) / "train.csv"
        with file.open("w", newline="", encoding="utf-8") as opened:
            rows = zip(map(" ".join, words), labels, strict=True)
            csv.writer(opened).writerows([("text", "label"), *rows])
        return str(file)
    if task == "text-generation":
        file = Path(folder) / "train.txt"
        file.write_text("\n".join(" ".join(w) for w in words), encoding="utf-8")
        return str(file)
    row = {
        "token-classification": lambda w, y: {"tokens": w, "ner_tags": [y] * len(w)},
        "question-answering": lambda w, y: {
            "question": w[0],
            "context": " ".join(w),
            "answers": {"text": [w[y]], "answer_start": [" ".join(w).index(w[y])]},
        },
    }[task]
    file = Path(folder) / "train.jsonl"
    lines = [json.dumps(row(w, y)) for w, y in zip(words, labels, strict=True)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)
