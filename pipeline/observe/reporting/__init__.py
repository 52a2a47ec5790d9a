"""The report: one self-contained page of what a run directory holds."""
