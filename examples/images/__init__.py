"""The parts of ``run_cifar_hap.py``: command line, images, models and the stages of a run."""
