"""The exceptions of hap_hf: one root, and kinds that are also the builtin a caller would expect."""


class HapError(Exception):
    """Root of every exception that hap_hf raises on purpose."""


class ConfigError(HapError, ValueError):
    """A setting is out of range, or settings contradict each other or the model."""


class UnsupportedModelError(HapError, ValueError):
    """The model cannot be analysed, or nothing in it can be removed."""


class PlanFormatError(HapError, ValueError):
    """A serialised plan is malformed, or newer than this version of hap_hf."""


class PlanMismatchError(HapError, ValueError):
    """A well-formed plan does not fit the model it is applied to."""


class BatchError(HapError, ValueError):
    """The batches cannot be used: none came, or they hold no labels, or nothing to score."""


class CurvatureError(HapError, RuntimeError):
    """A loss or a second derivative is not finite, or does not depend on the weights."""


class StaleOptimizerError(HapError, RuntimeError):
    """An optimizer still holds parameters that pruning replaced, and would leave the new ones untrained."""


class DistributedError(HapError, RuntimeError):
    """Processes that prune one model together disagree, or another of them failed."""


class ExportError(HapError, RuntimeError):
    """A model could not be written as a file that runs elsewhere, or the file computes something else."""
