"""Stages of the pipeline, one module each: options, identity, build and summary."""
