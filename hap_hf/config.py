"""Every choice a user can make, checked when it is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from hap_hf.criteria import Criterion, Reconstruction, criterion_of, hint_at
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.evidence.losses import LossFunction
from hap_hf.evidence.precision import Precision
from hap_hf.evidence.processes import ALONE, Processes
from hap_hf.names.amount import Amount
from hap_hf.names.bypass import Implants
from hap_hf.names.checks import at_least, boolean, member, plain_json, seed, share, shares, strings
from hap_hf.names.currencies import Currency, Units
from hap_hf.names.group import Group, Kind
from hap_hf.names.outcome import Footprint
from hap_hf.names.setting import setting
from hap_hf.names.targets import AMOUNTS, amount_of, check_bypasses, check_parts
from hap_hf.names.written import known_settings
from hap_hf.surgery import ImplantInit
from hap_hf.version import __version__


@dataclass(frozen=True, kw_only=True)
class HapConfig:
    """What to remove, how to score it and what to put in its place.

    Exactly one of the settings in ``AMOUNTS`` says how much. With N units in
    all, the ``prune_ratio`` r of them with the lowest sensitivity are cut; of the cut ones the ``implant_ratio`` q with
    the highest sensitivity become implants and the rest is removed. So 1 - r is kept, q r implanted and (1 - q) r
    removed, as in the reference code of Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022.

    What each setting means stands in its field's metadata, from which command lines and the documentation are made:
    ``HapConfig.help()`` returns it. Settings of a criterion belong to the criterion: ``method=Hessian(num_probes=32)``.

    Raises:
        ConfigError: If a value is out of range, settings contradict each other, or nothing would read one.

    Example:
        >>> HapConfig(target_params=0.5).criterion
        Reconstruction(num_output_probes=1)
    """

    prune_ratio: float | None = setting(None, "Share of all units below the threshold, in [0, 1).")
    target_params: float | None = setting(None, "Share of the prunable parameters to keep, in (0, 1).")
    target_macs: float | None = setting(None, "Share of the prunable multiply-accumulates to keep, in (0, 1).")
    target_model_params: float | None = setting(
        None, "Share of all parameters of the model to keep, embeddings included, in (0, 1)."
    )
    target_model_macs: float | None = setting(
        None, "Share of all multiply-accumulates of the model to keep, in (0, 1)."
    )
    amount: Amount | None = setting(None, "An amount in any other currency, such as Amount('params', 0.5).")
    parts: Mapping[str, float] | None = setting(
        None,
        "Other shares for groups, by kind or glob pattern, as {'vision*': 0.8}; the first that fits a group counts.",
    )
    implant_ratio: float = setting(0.0, "Share of the cut units that is implanted instead of removed, in [0, 1].")
    implants: Implants = setting(Implants.ROWS, "Rows, as implant_ratio says, or auto: low-rank paths beside blocks.")
    max_group_ratio: float = setting(
        0.95, "Largest share of a group's units that may be cut, in (0, 1]. The best unit always stays."
    )
    round_to: int = setting(1, "Surviving numbers of neurons and of channels are a multiple of this.")
    shards: int = setting(1, "Surviving numbers of all units are a multiple of this, as tensor parallelism needs.")
    equal_widths: bool = setting(False, "Cut the same share of each group, so that layers of one size stay alike.")
    kinds: tuple[Kind, ...] = setting(tuple(Kind), "Which kinds of units to touch: heads, ffn, channels.")
    include: tuple[str, ...] = setting(
        (), "Glob patterns; only groups whose name, or one of whose tensors' names, matches one are touched."
    )
    exclude: tuple[str, ...] = setting(
        (), "Glob patterns; groups whose name, or one of whose tensors' names, matches stay whole."
    )
    method: Criterion | str = setting(Reconstruction(), "How sensitivities are estimated: a criterion or its name.")
    num_passes: int | None = setting(
        None,
        "Passes in which units are chosen. Each takes its part of the amount and silences it; the next one scores what "
        "is left anew. By default as the criterion says: 2 for reconstruction, 4 for mask_ggn, 1 for the others.",
    )
    per_cost: bool | None = setting(
        None,
        "With a budget, rank units by sensitivity per cost of what the budget counts. By default as the criterion "
        "says: only with reconstruction and mask_ggn.",
    )
    compensate: bool | None = setting(
        None,
        "Fit the weights that read what is left to what they lose. By default as the criterion says: only with "
        "reconstruction and mask_ggn.",
    )
    reconstruct: bool | None = setting(
        None,
        "After the choice, fit the layers one after the other so that each gives what it gives in the dense model. By "
        "default where compensate holds.",
    )
    max_batches: int | None = setting(8, "Use at most this many batches; None for all.")
    precision: Precision = setting(Precision.FP32, "Arithmetic while scoring: fp32 (the model's own), bf16, fp16.")
    seed: int = setting(0, "Seed of probes and random scores.")
    implant_init: ImplantInit = setting(ImplantInit.SVD, "Initial weights of implants: svd or zero.")
    implant_cost: float = setting(
        0.25,
        "Size of a linear layer's implant as a share of the weights it replaces, in (0, 1). That of a convolution is "
        "1 x 1.",
    )
    recalibrate: bool = setting(
        True, "Estimate the statistics of batch norms anew after surgery, on the batches given; no labels needed."
    )
    progress: bool = setting(True, "Show progress bars.")

    # Hidden from type checkers, which would take it for the signature and check no setting.
    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **settings: Any) -> "HapConfig":
            """Say which setting was probably meant, where there is none of a name."""
            known = {f.name for f in fields(cls)}
            for name in settings:
                if name not in known:
                    raise ConfigError(f"HapConfig has no setting {name!r}{hint_at(name, known)}")
            return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every value and turn names into what they stand for.

        Raises:
            ConfigError: If a value is out of range or settings contradict each other.
        """
        # Names become members first, so that all checks below, and all that reads a config, meets only these.
        self._set("kinds", tuple(member(Kind, "kinds", k) for k in strings("kinds", self.kinds)))
        for name in ("include", "exclude"):
            self._set(name, strings(name, getattr(self, name)))
        self._set("method", criterion_of(self.method))
        for name, kind in {"precision": Precision, "implants": Implants, "implant_init": ImplantInit}.items():
            self._set(name, member(kind, name, getattr(self, name)))
        for name, among in {"implant_ratio": "[0, 1]", "max_group_ratio": "(0, 1]", "implant_cost": "(0, 1)"}.items():
            share(name, getattr(self, name), among)
        for name in ("round_to", "shards", "num_passes", "max_batches"):
            at_least(name, getattr(self, name), 1, none=name in {"num_passes", "max_batches"})
        seed("seed", self.seed)
        for name in ("per_cost", "compensate", "reconstruct", "recalibrate", "progress", "equal_widths"):
            boolean(name, getattr(self, name), none=name in {"per_cost", "compensate", "reconstruct"})
        if not self.kinds:
            raise ConfigError(f"kinds is empty: nothing could be removed; choose from {[k.value for k in Kind]}")
        self._check_together()

    def _check_together(self) -> None:
        """Check what no value can say alone: one amount, and no setting that nothing would read."""
        asked = self.asked  # first of all, as what follows relies on there being one amount
        self._set("parts", shares("parts", self.parts, "(0, 1]" if self.prune_ratio is None else "[0, 1)"))
        check_parts(self.parts, asked)
        if self.per_cost and isinstance(asked.what, Units):
            raise ConfigError("per_cost=True needs a budget to count costs by, got prune_ratio; ask for target_params")
        if self.implants is Implants.AUTO:
            check_bypasses(asked, self.per, self.implant_ratio, self.reconstructs, self.parts)
        if self.num_passes is not None and self.num_passes > 1 and not self.criterion.needs_batches:
            raise ConfigError(
                f"num_passes={self.num_passes} has no meaning with method={self.criterion.name!r}, which looks at the "
                "weights alone: every pass would come out as the first"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: the one moment at which a field may still change

    @property
    def criterion(self) -> Criterion:
        """How sensitivities are estimated."""
        return criterion_of(self.method)

    @property
    def asked(self) -> Amount:
        """How much is to be left."""
        return amount_of(vars(self))

    def with_amount(self, amount: Amount, **settings: Any) -> Self:
        """Return the same settings with another amount in place of theirs.

        Args:
            amount: How much is to be left.
            **settings: Other settings to change.

        Returns:
            The config.
        """
        changed: dict[str, Any] = {**dict.fromkeys(AMOUNTS), "amount": amount, **settings}
        return replace(self, **changed)

    def in_model(self, groups: Sequence[Group], size: Any) -> Self:
        """Return the settings for one model, where their amount counts all of it; the same for others.

        Args:
            groups: The groups of the model.
            size: What :func:`~hap_hf.measure_size` says of the model.

        Returns:
            The config.

        Raises:
            ConfigError: If what can never be removed is more than is to be left.
        """
        chosen = [g for g in groups if self.selects(g)]
        amount = self.asked.in_model(chosen, Footprint(size.params, size.macs))
        return self if amount == self.asked else self.with_amount(amount)

    def asked_of(self, value: float) -> Amount | None:
        """Return the amount that a share of ``parts`` asks for, meant as the config's; None where all is to stay."""
        keep = value if self.prune_ratio is None else 1 - value
        return None if keep == 1 else Amount(self.asked.what, keep)

    @property
    def passes(self) -> int:
        """Number of passes in which units are chosen."""
        return self.num_passes or self.criterion.passes

    @property
    def per(self) -> Currency | None:
        """What sensitivities are divided by before units are compared; None for nothing."""
        # None is "as the criterion says", here and below.
        wanted = self.criterion.per_cost if self.per_cost is None else self.per_cost
        return self.asked.what if wanted and not isinstance(self.asked.what, Units) else None

    @property
    def compensates(self) -> bool:
        """Whether the weights that read what is left make up for what they lose."""
        return self.criterion.compensates if self.compensate is None else self.compensate

    @property
    def reconstructs(self) -> bool:
        """Whether layers are fitted to what they give in the dense model, once it is known which units go."""
        return self.compensates if self.reconstruct is None else self.reconstruct

    def selects(self, group: Group) -> bool:
        """Return whether units of ``group`` may go: of a wanted kind, included if any are, and not excluded."""
        included = not self.include or any(group.matches(pattern) for pattern in self.include)
        return group.kind in self.kinds and included and not any(group.matches(pattern) for pattern in self.exclude)

    def evidence(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFunction | None = None,
        processes: Processes = ALONE,
    ) -> Evidence:
        """Return what is measured on, with the precision, the seed and the number of batches that are set here.

        Args:
            model: The model to be pruned.
            batches: Mappings as a Hugging Face collator gives them, or pairs of inputs and labels.
            loss_fn: Loss of a model on a batch, a scalar; by default the model's own.
            processes: The processes that measure together; ``batches`` are the share of this one.

        Returns:
            The evidence.
        """
        return Evidence.of(
            model,
            batches,
            loss_fn=loss_fn,
            precision=self.precision,
            seed=self.seed,
            max_batches=self.max_batches,
            progress=self.progress,
            processes=processes,
        )

    @classmethod
    def help(cls) -> dict[str, str]:
        """Return what each setting means, by name."""
        return {f.name: f.metadata["help"] for f in fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values, with the version that wrote them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {n: v.to_dict() if isinstance(v, (Criterion, Amount)) else plain_json(v) for n, v in own.items()}
        return {"hap_hf": __version__, **plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config that ``to_dict`` described.

        Args:
            values: Field names and their values. Of what a newer version wrote, unknown names are dropped, with a
                warning.

        Returns:
            The checked config.

        Raises:
            ConfigError: If ``values`` is no mapping, a name is unknown or a value is out of range.
        """
        settings = known_settings(values, {f.name for f in fields(cls)}, hint_at)
        if isinstance(settings.get("amount"), Mapping):
            settings["amount"] = Amount.from_dict(settings["amount"])
        return cls(**settings)
