"""GLUE's metrics, from ``evaluate`` or, where the Hub is out of reach, from scikit-learn and SciPy."""

import logging
from collections.abc import Callable, Mapping

import evaluate
import numpy as np
from huggingface_hub import constants
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error
from transformers import EvalPrediction

from glue.tasks import TASKS

logger = logging.getLogger(__name__)

Scorer = Callable[[np.ndarray, np.ndarray], float]
"""Takes predictions and references, each ``[num_samples]``."""

LOCAL: Mapping[str, Scorer] = {
    "accuracy": lambda predicted, truth: float(accuracy_score(truth, predicted)),
    "f1": lambda predicted, truth: float(f1_score(truth, predicted)),
    "matthews_correlation": lambda predicted, truth: float(matthews_corrcoef(truth, predicted)),
    "mse": lambda predicted, truth: float(mean_squared_error(truth, predicted)),
    "pearson": lambda predicted, truth: float(pearsonr(predicted, truth)[0]),
    "spearmanr": lambda predicted, truth: float(spearmanr(predicted, truth)[0]),
}


def make_metric(
    task_name: str | None, *, regression: bool, path: str | None
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function with which a Trainer turns logits into metrics.

    Args:
        task_name: The GLUE task, or None for data of one's own: accuracy, or mean squared error for a regression.
        regression: Whether the model predicts a number.
        path: Local copy of the ``evaluate`` metric, in place of the Hub's.

    Returns:
        A function from predictions to metrics by name, with their mean as ``combined_score`` where there are several.
    """
    if task_name is None:
        score = _local_scores(("mse",) if regression else ("accuracy",))
    else:
        score = _glue_scores(task_name, path)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits  # some models return hidden states too
        predicted = np.squeeze(logits, axis=-1) if regression else np.argmax(logits, axis=-1)
        result = score(predicted, prediction.label_ids)
        if len(result) > 1:
            result["combined_score"] = float(np.mean(list(result.values())))
        return result

    return compute


def _glue_scores(task_name: str, path: str | None) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    offline = path is None and constants.HF_HUB_OFFLINE
    if offline:
        evaluate.config.HF_EVALUATE_OFFLINE = True  # evaluate obeys only a switch of its own
    try:
        metric = evaluate.load(path or "glue", task_name)
    except OSError as error:
        if path is not None:
            raise
        logger.warning(
            "the metric evaluate.load('glue', %r) is out of reach (%s); %s computed by scikit-learn and SciPy instead",
            task_name,
            "HF_HUB_OFFLINE is set and it is not in the cache" if offline else str(error).splitlines()[0],
            " and ".join(TASKS[task_name].metrics),
        )
        return _local_scores(TASKS[task_name].metrics)

    def scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        computed = metric.compute(predictions=predicted, references=truth)
        return {name: float(value) for name, value in computed.items()}

    return scores


def _local_scores(names: tuple[str, ...]) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    def scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return {name: LOCAL[name](predicted, truth) for name in names}

    return scores
