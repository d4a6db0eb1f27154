"""The parts of ``run_glue_hap.py``: command line, data, metrics and the stages of a run."""
