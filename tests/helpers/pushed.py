"""A process that pushes pruned models to the stand-in of the Hub and reads them back; writes what it saw to a file."""

# ruff: noqa: E402 (settings that are read at imports)

import json
import os
import sys
import tempfile
from pathlib import Path

from loopback_hub import Hub, serve

# Read when huggingface_hub is imported.
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ |= {
    "HF_ENDPOINT": serve(),
    "HF_TOKEN": "hf_stand_in",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HOME": tempfile.mkdtemp(),
}

import torch

torch.set_num_threads(1)

from documented import texts
from on_disk import save_model, tokenizer
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline
from typer.testing import CliRunner

from hap_hf import HapConfig, HessianPruner, prune
from hap_hf.cli.app import app

SETTINGS = HapConfig(target_params=0.5, method="taylor", progress=False)


def main():
    os.chdir(tempfile.mkdtemp())
    seen = {}
    save_model("text-classification", "dense")
    dense = AutoModelForSequenceClassification.from_pretrained("dense")
    dense.push_to_hub("me/dense")
    tokenizer().push_to_hub("me/dense")
    model = AutoModelForSequenceClassification.from_pretrained("me/dense")
    rows = texts(16)
    batches = [{k: torch.stack([row[k] for row in rows[i : i + 8]]) for k in rows[0]} for i in (0, 8)]
    report = prune(model, batches, SETTINGS)
    model.push_to_hub("me/pruned")
    tokenizer().push_to_hub("me/pruned")
    seen["pruned"] = {name: len(data) for name, data in Hub.repos["me/pruned"]["main"].items()}
    seen["card"] = Hub.repos["me/pruned"]["main"]["README.md"].decode()
    seen["dense card"] = Hub.repos["me/dense"]["main"]["README.md"].decode()
    seen["params"] = [report.before.params, report.after.params]
    again = AutoModelForSequenceClassification.from_pretrained("me/pruned")
    seen["same"] = all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    seen["answer"] = pipeline("text-classification", model="me/pruned")("w1 w2")[0]["label"]

    model.push_to_hub("me/pruned", create_pr=True, commit_message="as a pull request")
    seen["from a pull request"] = AutoModelForSequenceClassification.from_pretrained(
        "me/pruned", revision="refs/pr/1"
    ).num_parameters()

    Hub.requests.clear()
    done = CliRunner().invoke(app, ["inspect", "me/pruned", "--json"])
    seen["inspected"] = json.loads(done.stdout)["parameters"] if done.exit_code == 0 else done.output
    asked = [r for r in Hub.requests if r.startswith("GET") and "model.safetensors" in r]
    seen["whole files"] = [r for r in asked if "bytes=" not in r]
    done = CliRunner().invoke(app, ["inspect", "me/nothing"])
    seen["missing"] = [done.exit_code, done.stderr]

    model.push_to_hub("me/secret", private=True)
    token = os.environ.pop("HF_TOKEN")
    done = CliRunner().invoke(app, ["inspect", "me/secret"])
    seen["private"] = [done.exit_code, done.stderr]
    os.environ["HF_TOKEN"] = token

    args = TrainingArguments(
        "out",
        hub_model_id="me/trained",
        push_to_hub=True,
        max_steps=1,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
    )
    model = AutoModelForSequenceClassification.from_pretrained("me/dense")
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[HessianPruner(SETTINGS)])
    trainer.train()
    trainer.push_to_hub()
    seen["trained"] = sorted(Hub.repos["me/trained"]["main"])
    seen["trained card"] = Hub.repos["me/trained"]["main"]["README.md"].decode()
    Path(sys.argv[1]).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
