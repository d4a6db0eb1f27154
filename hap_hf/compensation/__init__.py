"""Making up for units that go: the weights that read the others are fitted to what is lost."""

from hap_hf.compensation.compensation import Compensation

__all__ = ["Compensation"]
