"""HTML report of a run directory, in one self-contained page."""
