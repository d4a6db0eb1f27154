"""Tiny models, tokenizers and files for the tests of the GLUE example."""

from pathlib import Path
from typing import Any

import numpy as np
import run_glue_hap
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

WORDS = ["good", "bad", "film", "play", "the", "a", "was", "is", "very", "not"]


def sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(count)]


def pairs(
    count: int = 24, seed: int = 0, columns: tuple[str, str] = ("sentence1", "sentence2")
) -> dict[str, list[Any]]:
    first, second = sentences(count, seed), sentences(count, seed + 100)
    labels = [int("good" in a.split()) for a in first]
    return {columns[0]: first, columns[1]: second, "label": labels, "idx": list(range(count))}


def write(table: dict[str, list[Any]], file: Path) -> Path:
    writers = {"parquet": "to_parquet", "csv": "to_csv", "json": "to_json", "jsonl": "to_json"}
    getattr(Dataset.from_dict(table), writers[file.suffix[1:]])(file)
    return file


def build_model(folder: Path, *, head: bool = False, **config: Any) -> Path:
    torch.manual_seed(0)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(specials + WORDS), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder, config=BertConfig()).save_pretrained(folder)
    small = BertConfig(
        vocab_size=len(specials + WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        **config,
    )
    model = AutoModelForSequenceClassification.from_config(small)
    (model if head else model.bert).save_pretrained(folder)
    return folder


def run(model: Path, output: Path, *more: str) -> dict[str, float]:
    common = {
        "model_name_or_path": model,
        "output_dir": output,
        "cache_dir": output / "cache",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return run_glue_hap.main([*(word for name, value in common.items() for word in (f"--{name}", str(value))), *more])


PRUNE = ["--target_params", "0.5", "--max_batches", "2", "--progress", "false"]


def logits_of(folder: Path, *texts: list[str]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(*texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.double().numpy()


def num_params(folder: Path) -> int:
    return sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(folder).parameters())
