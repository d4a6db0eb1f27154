"""As small as possible with no more lost than is allowed, judged by the Trainer's own evaluation."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from hap_hf.config import HapConfig
from hap_hf.errors import ConfigError
from hap_hf.evidence.evidence import Evidence
from hap_hf.floor import check_search, search_floor
from hap_hf.model.rollback import undone_on_error
from hap_hf.names.checks import of_settings
from hap_hf.names.setting import setting
from hap_hf.report import PruningReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """How much a pruned model may lose, for ``HessianPruner(config, floor=Floor(drop=0.01))``.

    The units are scored once, for the amount of the config, which is the most that may go. Amounts between that and
    nothing are carried out on copies, which the Trainer evaluates on its ``eval_dataset`` by its ``compute_metrics``.
    The model is pruned by the smallest that was good enough; see :func:`~hap_hf.prune_to_floor`.

    Raises:
        ConfigError: If a value is out of range.
    """

    drop: float = setting(0.01, "How much of the metric may be lost, in its own unit: 0.01 is a point of accuracy.")
    metric: str = setting("accuracy", "What compute_metrics calls it, or loss; names that end in loss should be low.")
    num_trials: int = setting(6, "Amounts that are tried at most, each with an evaluation.")

    @classmethod
    def of(cls, given: "Floor | Mapping[str, Any] | float | None", config: HapConfig, **others: Any) -> "Floor | None":
        """Return the floor that a user gave, checked.

        Args:
            given: The floor, its settings by name, a drop, or None.
            config: How the model is pruned.
            **others: Other settings of the callback that do not go with a floor, by name; None or false where they are
                left out.

        Returns:
            The floor; None for none.

        Raises:
            ConfigError: If it cannot be searched for with these settings.
        """
        if given is None:
            return None
        if isinstance(given, Mapping):
            given = of_settings(cls, given)
        elif not isinstance(given, Floor):
            given = cls(drop=given)
        check_search(config, given.drop, given.num_trials)
        if wrong := [name for name, value in others.items() if value is not None and value is not False]:
            raise ConfigError(
                f"floor searches for one amount and prunes once, and {', '.join(wrong)} "
                f"{'asks' if len(wrong) == 1 else 'ask'} for something else; leave one of them out"
            )
        return given

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)

    def check(self, trainer: Trainer) -> None:
        """Check that the Trainer can evaluate, before anything is done.

        Args:
            trainer: The Trainer.

        Raises:
            ConfigError: If it has nothing to evaluate on, several things, or no metric.
        """
        if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, Mapping):
            raise ConfigError(
                f"floor judges models on the Trainer's eval_dataset, which is "
                f"{'missing' if trainer.eval_dataset is None else 'a mapping of several'}; give the Trainer one"
            )
        if trainer.compute_metrics is None and self._name != "eval_loss":
            raise ConfigError(
                f"floor looks for the metric {self.metric!r}, and the Trainer has no compute_metrics; pass one, or use "
                "Floor(metric='loss', drop=...)"
            )

    @property
    def _name(self) -> str:
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    def prune(
        self, trainer: Trainer, evidence: Evidence, config: HapConfig, optimizer: Optimizer | None
    ) -> PruningReport:
        """Prune the Trainer's model as far as the floor allows.

        Args:
            trainer: The Trainer.
            evidence: Its model, and what to score and repair on.
            config: How to prune.
            optimizer: An optimizer of the model that goes on.

        Returns:
            The report.

        Raises:
            ConfigError: If the metric does not exist, or nothing that was tried is good enough.
        """
        with undone_on_error(evidence.model, optimizer), evidence.processes.agreeing("pruning"):
            found = search_floor(
                evidence,
                self._judge(trainer),
                config,
                drop=self.drop,
                num_trials=self.num_trials,
                optimizer=optimizer,
            )
        logger.info("%s", str(found).rpartition("\n")[2])
        return found.report

    def _judge(self, trainer: Trainer) -> Callable[[nn.Module], float]:
        """Return a function that scores a model in place of the Trainer's, the higher the better."""
        name, sign = self._name, -1.0 if self.metric.endswith("loss") else 1.0

        def judge(model: nn.Module) -> float:
            own = trainer.model, trainer.model_wrapped
            trainer.model = trainer.model_wrapped = cast(Any, model)
            try:
                output = trainer.evaluation_loop(
                    trainer.get_eval_dataloader(),
                    description="Floor",
                    prediction_loss_only=True if trainer.compute_metrics is None else None,
                )
                # Closes the bar, which would go on with the next one.
                trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, output.metrics or {})
            finally:
                trainer.model, trainer.model_wrapped = own
            metrics = output.metrics or {}
            if name not in metrics:
                raise ConfigError(f"floor looks for the metric {name!r}, and the evaluation has {sorted(metrics)}")
            return sign * float(metrics[name])

        return judge
