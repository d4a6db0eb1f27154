"""What pruning cost and saved."""

from hap_hf.report.clock import Clock
from hap_hf.report.details import details_of
from hap_hf.report.group import GroupReport
from hap_hf.report.make import make_report
from hap_hf.report.report import PruningReport
from hap_hf.report.size import ModelSize, measure_size

__all__ = ["Clock", "GroupReport", "ModelSize", "PruningReport", "details_of", "make_report", "measure_size"]
