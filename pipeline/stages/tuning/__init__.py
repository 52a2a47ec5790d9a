"""Hyperparameter search: trials of the pipeline under Ray Tune."""

TUNE_VERSION = 2
"""Raise when this stage's results change; see tests/integration/test_golden.py."""
