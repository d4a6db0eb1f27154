r"""How well and how fast the estimators of the trace score rank the units, on one fixed set of batches.

A dense model is fine-tuned, or taken as it is (``--num_train_epochs 0``). Each estimator scores the units of its groups
on the same training batches, in a process of its own. The reference is the same trace, by as many probes, of another
seed, as bring the median standard error of a score, relative to the score, below ``--reference_error``. In networks
that are piecewise linear in each weight, such as those with ReLU, ``--reference "ggn, exact"`` is the same trace
without noise, as no diagonal entry of the Hessian differs from the Gauss-Newton matrix's; in others it is the trace of
that matrix. Rank correlations are taken over all units, and over those of each kind; so is, over all, the share found
of the reference's half of least sensitive units.

Other libraries, where they are installed, compute the products of the same probes, and so do the library's own other
ways to compute them; the last column says by how much their scores differ from those of ``hessian`` at most, relative
to the largest of the same group. ``loop`` is what HAP's paper does: a dot product for each unit and probe in Python.

``--max_batches`` and the batch size say how much data there is. Rows are written to ``WORK_DIR/rows.jsonl`` as they are
done, and are not made again; nor are parts of the reference.

    python examples/benchmarks/score_fidelity.py --work_dir runs/fidelity-mrpc --model_name_or_path ./my-bert \
        --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet --num_train_epochs 3 \
        --learning_rate 5e-5 --max_batches 1

    python examples/benchmarks/score_fidelity.py --work_dir runs/fidelity-resnet20 --images \
        --model_name_or_path cifar_resnet20 --weights resnet20.safetensors --dataset_name cifar10 --num_train_epochs 0 \
        --max_batches 1
"""

import argparse
import json
import logging
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from subjects import benchmark_parser, make_subject
from trace_peers import PEERS, is_installed
from trace_runs import ESTIMATORS, SPLIT, run_alone
from trace_table import Reference, Row, to_markdown

from hap_hf import find_groups

logger = logging.getLogger("score_fidelity")

BY_PROBES = ("hessian", SPLIT)
EXACT = "ggn, exact"
WITHOUT_PROBES = {"ggn": 1, EXACT: 0}
FIRST_PART = 8
"""Probes of the first part of the reference."""


def main(argv: Sequence[str] | None = None) -> str:
    """Make the rows that are missing and print the table.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        The table in markdown, with the command that made it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own = parse(words)
    rows, absent = [], []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(own, Path(folder))
        for name in own.estimators:
            if name in PEERS and not is_installed(name):
                absent.append(f"{name} is not installed and left out.\n")
            else:
                rows += bench.rows_of(name, numbers_of(name, own), own.seed)
        reference = reference_of(bench)
    text = to_markdown(rows, bench.groups(), reference, own.reference) + "".join(absent)
    text += f"\n```bash\npython examples/benchmarks/score_fidelity.py {shlex.join(words)}\n```\n"
    (own.work_dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return text


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the settings.

    Args:
        words: The command line, without the program's name.

    Returns:
        The settings; ``flags`` are those of the subject.
    """
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for the dense model and the results")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--probes", type=int, nargs="+", default=[3, 10, 30, 100, 300], help="numbers of probes")
    parser.add_argument("--peer_probes", type=int, default=3, help="probes of other libraries and other products")
    parser.add_argument(
        "--reference", choices=(*BY_PROBES, EXACT), default=SPLIT, help="how the reference is estimated"
    )
    parser.add_argument("--reference_error", type=float, default=0.05, help="median relative standard error of it")
    parser.add_argument("--most_probes", type=int, default=4096, help="most probes of it")
    parser.add_argument("--seed", type=int, default=0, help="seed of fine-tuning and scores")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of an estimator")
    parser.add_argument("--images", action="store_true", help="the model classifies images, not texts")
    own, flags = parser.parse_known_args(words)
    own.flags = flags
    for name, least in (("probes", min(own.probes)), ("peer_probes", own.peer_probes)):
        if least < 2:
            parser.error(f"--{name} must be at least 2, as a standard error takes two, got {least}")
    if own.most_probes < FIRST_PART:
        parser.error(f"--most_probes must be at least {FIRST_PART}, got {own.most_probes}")
    return own


def numbers_of(name: str, own: argparse.Namespace) -> list[int]:
    """Return with how many probes an estimator runs; 0 for as many as there are outputs."""
    if name in WITHOUT_PROBES:
        return [WITHOUT_PROBES[name]]
    if name not in BY_PROBES:
        return [own.peer_probes]
    return sorted({*own.probes, *([own.peer_probes] if name == "hessian" else [])})


class Bench:
    """The rows of earlier runs, and more of them when they are asked for.

    Args:
        own: The settings.
        folder: A folder for what other processes read.
    """

    def __init__(self, own: argparse.Namespace, folder: Path) -> None:
        self.own, self.folder, self.file = own, folder, own.work_dir / "rows.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    @cached_property
    def material(self) -> Path:
        """The file that :func:`run_alone` reads."""
        own = self.own
        subject = make_subject(own.flags, own.work_dir / f"dense-{own.seed}", own.seed, on_images=own.images)
        groups = find_groups(subject.model, subject.batches[0])
        self._keep({**self._about("units"), "groups": [[group.kind.value, group.num_units] for group in groups]})
        file = self.folder / "material.pt"
        torch.save((subject.model.eval(), groups, [dict(batch) for batch in subject.batches]), file)
        return file

    def groups(self) -> list[tuple[str, int]]:
        """Return kind and number of units of each group."""
        return [(kind, count) for kind, count in self._found("units")[0]["groups"]]

    def rows_of(self, name: str, numbers: Sequence[int], seed: int) -> list[Row]:
        """Return the rows of an estimator, made where they are missing.

        Args:
            name: One of ``ESTIMATORS``.
            numbers: Numbers of probes.
            seed: Seed of the probes.

        Returns:
            A row for each number; a single one that says so if the estimator failed.
        """
        missing = [n for n in numbers if not self._found(name, seed=seed, num_probes=n)]
        if missing:
            material = self.material
            try:
                estimates = run_alone(material, name, missing, seed=seed, threads=self.own.threads)
            except Exception as error:  # an estimator that fails is a result
                logger.warning("%s failed: %s", name, error)
                return [{"estimator": name, "failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}]
            for estimate in estimates:
                self._keep({**self._about(name, seed), **asdict(estimate)})
                logger.info("%s, %d probes: %.2f s", name, estimate.num_probes, estimate.seconds)
        return [self._found(name, seed=seed, num_probes=n)[0] for n in numbers]

    def part_of_reference(self, seed: int, num_probes: int) -> Row:
        """Return a part of the reference, of so many probes if it is not there yet."""
        found = self._found(self.own.reference, seed=seed)
        (row,) = found[:1] or self.rows_of(self.own.reference, [num_probes], seed)
        if "failed" in row:
            raise RuntimeError(f"there is no reference: {self.own.reference} failed: {row['failed']}")
        return row

    def _about(self, name: str, seed: int | None = None) -> Row:
        return {"estimator": name, "seed": seed, "threads": self.own.threads, "flags": self.own.flags}

    def _found(self, name: str, **more: int) -> list[Row]:
        about = {**self._about(name), **more}
        return [row for row in self.rows if all(row.get(key) == value for key, value in about.items())]

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.own.work_dir.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def reference_of(bench: Bench) -> Reference:
    """Return the reference, from as many probes as its error takes.

    Args:
        bench: Where parts come from.

    Returns:
        The reference; its error is larger than wanted if there were not probes enough.
    """
    own, parts = bench.own, []
    if own.reference == EXACT:
        values = torch.tensor(bench.part_of_reference(own.seed, 0)["sensitivity"], dtype=torch.float64)
        return Reference(values, torch.zeros_like(values), 0)
    size = FIRST_PART
    while True:
        parts.append(bench.part_of_reference(own.seed + 1 + len(parts), size))
        found = Reference.of(parts)
        logger.info("reference: %d probes, relative error %.3f", found.num_probes, found.relative_error)
        left = own.most_probes - found.num_probes
        if found.relative_error <= own.reference_error or left < 2:
            return found
        # Errors fall with the square root of the number. What is measured of them is noisy, so at most it is doubled.
        factor = min((found.relative_error / own.reference_error) ** 2 - 1, 1.0)
        size = min(max(math.ceil(factor * found.num_probes), FIRST_PART), left)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    main()
