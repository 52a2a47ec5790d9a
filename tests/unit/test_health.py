"""Errors name what a reader needs."""

import pickle
from pathlib import Path

from upath import UPath

from ncfm.distill import NonFiniteLossError
from pipeline.runtime.health import fatal_error, record_fatal, stragglers


def test_a_slow_worker_is_named() -> None:
    assert stragglers([1.0, 1.1, 3.0, 0.9], [1, 1, 1, 1], 2.0) == [(2, 3.0)]
    assert stragglers([1.0, 2.5], [1, 1], 2.0) == [(1, 2.5)]


def test_more_work_is_not_slowness() -> None:
    assert stragglers([1.0, 1.1, 3.0, 0.9], [1, 1, 3, 1], 2.0) == []
    assert stragglers([5.0], [1], 2.0) == []


def test_the_fatal_error_names_step_class_and_checkpoint(tmp_path: Path) -> None:
    directory = UPath(tmp_path)
    assert fatal_error(directory) is None
    error: NonFiniteLossError = pickle.loads(pickle.dumps(NonFiniteLossError(37, [1])))
    record_fatal(directory, error, ("cat", "dog"))
    assert "no checkpoint yet" in str(fatal_error(directory))
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / "step-00000030" / "checkpoint.json").write_text("{}")
    record_fatal(directory, error, ("cat", "dog"))
    text = str(fatal_error(directory))
    assert "step 37" in text
    assert "[1]" in text
    assert "dog" in text
    assert "step-00000030" in text
