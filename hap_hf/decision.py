"""What shall be done to a model, decided and not yet done."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor, nn

from hap_hf.compensation import Compensation
from hap_hf.config import HapConfig
from hap_hf.criteria import Scores
from hap_hf.discovery import Discovery, LeftWhole
from hap_hf.errors import ConfigError, PlanMismatchError
from hap_hf.evidence.evidence import Evidence
from hap_hf.names.bypass import BypassPlan
from hap_hf.names.group import Kind
from hap_hf.names.outcome import footprint, whole
from hap_hf.names.plan import GroupPlan, PruningPlan
from hap_hf.report import ModelSize, PruningReport, make_report
from hap_hf.report.files import open_tensors, read_json, write_whole
from hap_hf.selection import Round
from hap_hf.selection.make import provenance

logger = logging.getLogger(__name__)

_FILES = ("decision.json", "decision.safetensors")


@dataclass(frozen=True, eq=False)
class Decision:
    """What shall be done to a model. It holds no weights of the model and has changed nothing.

    Args:
        evidence: What it was measured on.
        config: The settings, those of its round if there are several.
        discovery: What can be removed.
        scores: Sensitivities of the units.
        stage: What happens to every group.
        threshold: Sensitivity (per cost, where units are ranked by that) of the least sensitive unit above the cut.
        values: Weights and biases that make up for what goes, by name.
        moments: Second moments of layer inputs for the initial weights of implants, by name of the weight.
        before: Size of the model.
        place: Which of several rounds it is.
        stamps: Sums of the weights that ``values`` stand in for, by which a model is recognised.
        scored: Sums of all weights that were scored, by which ``decide_again`` recognises the model.
        compensation: What is known of the layers' inputs, for other amounts; None where nothing compensates.
        seconds: Wall-clock time of each step.
        loss: Mean loss of the model on the batches; None where the criterion looks at no batch.
        reconstructed: Whether ``values`` were fitted to the statistics of batch norms as they are.
        bypasses: Low-rank paths that are put beside blocks.
        paths: Their weights by name, with the inputs and outputs of the model as it is.
    """

    evidence: Evidence
    config: HapConfig
    discovery: Discovery
    scores: Scores
    stage: tuple[GroupPlan, ...]
    threshold: float
    values: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    before: ModelSize
    place: Round = field(default_factory=Round)
    stamps: Mapping[str, float] = field(default_factory=dict)
    scored: Mapping[str, float] = field(default_factory=dict)
    compensation: Compensation | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    reconstructed: bool = False
    bypasses: tuple[BypassPlan, ...] = ()
    paths: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def plan(self) -> PruningPlan:
        """The plan, with how it came about."""
        origin = provenance(self.scores, self.config, self.threshold)
        origin |= {"round": self.place.number, "num_rounds": self.place.total}
        return PruningPlan((self.stage,), (origin,), (self.bypasses,))

    @property
    def expected(self) -> PruningReport:
        """The report as it will be, with sizes by the plan's own algebra in place of measured ones."""
        # What lies in no group stays as it is, so that the difference of the groups is that of the model.
        full, left = footprint(whole(g.group for g in self.stage)), footprint(self.stage, self.bypasses)
        after = ModelSize(
            round(self.before.params - full.params + left.params), self.before.macs - full.macs + left.macs
        )
        return self.report(after, self.seconds)

    def report(self, after: ModelSize, seconds: Mapping[str, float], loss: float | None = None) -> PruningReport:
        """Return what was done, once it was.

        Args:
            after: Size of the model afterwards.
            seconds: Wall-clock time of each step.
            loss: Mean loss on the batches afterwards.

        Returns:
            The report.
        """
        return make_report(
            self.plan,
            self.before,
            after,
            config=self.config,
            scores=self.scores,
            threshold=self.threshold,
            left_whole=self.discovery.left_whole,
            seconds=seconds,
            loss_before=self.loss,
            loss_after=loss,
        )

    def __str__(self) -> str:
        """Return the table of what will be left."""
        return str(self.expected)

    def check_fits(self, model: nn.Module) -> None:
        """Check that the weights of ``model`` are those that the decision was made for.

        Args:
            model: The model, or a copy of it.

        Raises:
            PlanMismatchError: If they changed since, so that what makes up for units would undo the change.
        """
        # Where nothing is compensated there are no stamps, and surgery alone fits weights that were trained since.
        if changed := _changed(model, self.stamps):
            raise PlanMismatchError(
                f"{changed[0]} and {len(changed) - 1} other weights are not those that the decision was made for, as "
                "after training; decide anew, or drop what makes up for units: dataclasses.replace(decision, "
                "values={}, stamps={})"
            )

    def check_same_model(self) -> None:
        """Check that the model of the evidence is as it was when its units were scored.

        Raises:
            PlanMismatchError: If its weights changed since, so that scores and layer inputs are those of other weights.
        """
        if changed := _changed(self.evidence.model, self.scored):
            raise PlanMismatchError(
                f"{changed[0]} and {len(changed) - 1} other weights changed since the units were scored, as after "
                "training or pruning; decide(evidence, config) anew"
            )

    def save(self, directory: str | Path) -> None:
        """Write the decision to ``decision.json`` and ``decision.safetensors``.

        What other amounts would need of the layers' inputs is not written: it is large.

        Args:
            directory: Folder to write to; made where it does not exist.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        # Numbers and words go to the JSON file, tensors to the other.
        scores = {k: v for k, v in vars(self.scores).items() if not isinstance(v, Mapping)}
        entry = {
            "format": 1,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "scores": scores,
            "threshold": self.threshold,
            "before": asdict(self.before),
            "place": asdict(self.place),
            "stamps": dict(self.stamps),
            "scored": dict(self.scored),
            "left_whole": [asdict(w) for w in self.discovery.left_whole],
            "groups": [g.name for g in self.discovery.groups],
            "seconds": dict(self.seconds),
            "loss": self.loss,
            "reconstructed": self.reconstructed,
        }
        tensors = {
            f"{part}/{name}": tensor.contiguous()
            for part, named in (
                *self._named_scores(),
                *((part, getattr(self, part)) for part in ("values", "moments", "paths")),
            )
            for name, tensor in named.items()
        }
        write_whole(folder / _FILES[1], partial(save_file, tensors))
        text = json.dumps(entry, indent=1)
        write_whole(folder / _FILES[0], partial(Path.write_text, data=text, encoding="utf-8"))

    def _named_scores(self) -> list[tuple[str, Mapping[str, Tensor]]]:
        return [(part, getattr(self.scores, part)) for part in ("sensitivity", "standard_error", "gone_in")]

    @classmethod
    def load(cls, directory: str | Path, evidence: Evidence) -> Self:
        """Return the decision that :meth:`save` wrote.

        Args:
            directory: Folder with ``decision.json`` and ``decision.safetensors``.
            evidence: The model that it was made for, and batches for what follows the cut.

        Returns:
            The decision.

        Raises:
            ConfigError: If a newer version wrote it, or it is damaged, or no decision.
        """
        entry = read_json(Path(directory) / _FILES[0])
        if not isinstance(entry, Mapping) or entry.get("format") != 1:
            raise ConfigError(f"expected a decision of format 1 in {_FILES[0]}, got something else; upgrade hap_hf")
        parts: dict[str, dict[str, Tensor]] = {}
        with open_tensors(Path(directory) / _FILES[1]) as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                # At the first slash: names of parts have none.
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
        # Its plan names all groups, also those that stay, so that they need not be found again.
        plan = PruningPlan.from_dict(entry["plan"])
        (stage,) = plan.stages
        whole_ones = tuple(
            LeftWhole(tuple(w["names"]), w["reason"], None if w["kind"] is None else Kind(w["kind"]))
            for w in entry["left_whole"]
        )
        tensors: dict[str, Any] = {k: parts.get(k, {}) for k in ("sensitivity", "standard_error", "gone_in")}
        scores = Scores(**tensors, **entry["scores"])
        return cls(
            evidence,
            HapConfig.from_dict(entry["config"]),
            Discovery(tuple(g.group for g in stage), whole_ones),
            scores,
            stage,
            entry["threshold"],
            parts.get("values", {}),
            parts.get("moments", {}),
            ModelSize(**entry["before"]),
            Round(**entry["place"]),
            entry["stamps"],
            entry["scored"],
            seconds=entry["seconds"],
            loss=entry.get("loss"),
            reconstructed=entry.get("reconstructed", False),  # not written before 0.3
            bypasses=plan.bypasses[0],
            paths=parts.get("paths", {}),
        )

    def without_values(self) -> "Decision":
        """Return the same decision for a model whose weights have changed or will change until it is carried out."""
        return replace(self, values={}, stamps={}, reconstructed=False, bypasses=(), paths={})


def _changed(model: nn.Module, stamps: Mapping[str, float]) -> list[str]:
    """Return the names of the weights that are others than those of which the stamps were made."""
    now = stamps_of(model, stamps)
    # Sums depend in their last bits on the order in which threads add up; a step of training changes far more.
    return [n for n, stamp in stamps.items() if not math.isclose(now.get(n, math.nan), stamp, rel_tol=1e-9)]


def stamps_of(model: nn.Module, names: Mapping[str, Any]) -> dict[str, float]:
    """Return a number for each weight that tells whether it is still the same.

    Args:
        model: Any model; parameters that it does not have get no number.
        names: Names of parameters.

    Returns:
        The sum of each one's entries and of their squares, by name.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    # Of entries and of squares, as a change may leave one of the two sums as it was.
    doubles = {name: own[name].detach().double() for name in names if name in own}
    return {name: float(x.sum() + x.square().sum()) for name, x in doubles.items()}
