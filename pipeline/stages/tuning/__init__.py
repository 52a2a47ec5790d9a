"""The search: trials of the whole pipeline under Ray Tune."""

TUNE_VERSION = 2
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""
