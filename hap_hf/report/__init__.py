"""What pruning cost and saved."""

from hap_hf.report.report import PruningReport, make_report
from hap_hf.report.size import ModelSize, measure_size

__all__ = ["ModelSize", "PruningReport", "make_report", "measure_size"]
