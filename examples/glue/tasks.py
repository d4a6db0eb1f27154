"""GLUE's nine tasks in names only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a GLUE task's data looks like and how it is measured.

    Args:
        columns: Names of its one or two text columns.
        labels: Names of its labels, in the order of their numbers; empty for regression.
        metrics: Names of its metrics.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]


_PAIR = ("sentence1", "sentence2")

TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": Task(_PAIR, ("entailment", "not_entailment"), ("accuracy",)),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "stsb": Task(_PAIR, (), ("pearson", "spearmanr")),
    "wnli": Task(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}
