"""The command line: ``hap-hf``, or ``python -m hap_hf``."""
