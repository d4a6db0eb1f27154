"""Draw the pictures of ``docs/command-line.md``: train a ViT on digits, then run the commands of the page.

    python docs/pictures/make.py

It takes about a minute on one core, and chromium for the picture of the page.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, set_seed

HERE = Path(__file__).parent


def train(folder: Path) -> None:
    """Save a small ViT that reads most digits right."""
    set_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(25):
        for rows in torch.randperm(1400).split(64):
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)


def main() -> None:
    """Run the commands and keep the pictures."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        train(work / "vit")
        shares = ["--keep", "0.8,0.6,0.4,0.3,0.2,0.15,0.1"]
        for words in (
            ["sweep", "vit", "--data", "digits", "--out", "tried", "--html", *shares],
            ["prune", "vit", "--data", "digits", "--keep", "0.4", "--implant-ratio", "0.2", "--out", "smaller"],
        ):
            subprocess.run([sys.executable, "-m", "hap_hf", *words], cwd=work, check=True)
        for picture in (*(work / "tried").glob("*.png"), *(work / "smaller").glob("*.png")):
            shutil.copy(picture, HERE)
        browser = shutil.which("chromium")
        if browser is None:
            raise SystemExit("page.png is as it was: it takes chromium")
        shown = [f"--screenshot={HERE / 'page.png'}", f"file://{work}/tried/sweep.html#keep=0.3"]
        flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,1120"]
        subprocess.run([browser, *flags, *shown], check=True, capture_output=True)


if __name__ == "__main__":
    main()
