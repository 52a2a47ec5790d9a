"""Distributed runtime: workers, collectives, checkpoints and files."""
