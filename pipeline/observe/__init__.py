"""Observability of a run: progress, metrics, tracking, pictures, the report."""
