"""The search: trials of the whole pipeline under Ray Tune."""
