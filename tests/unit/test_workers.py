"""What is left of an error when Ray has wrapped it."""

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

import pipeline.run
from pipeline.errors import ShardError, StorageError
from pipeline.runtime.failures import storage_error

FULL = StorageError("the disk is full")


def as_a_task(error: Exception) -> Exception:
    wrapped: Exception = RayTaskError("f", "Traceback ...", error).as_instanceof_cause()
    return wrapped


def as_a_worker(error: Exception) -> Exception:
    return WorkerGroupError("rank 1", {1: UserExceptionWithTraceback(error, "Traceback ...")})


def chained(error: Exception) -> Exception:
    later = RuntimeError("later")
    later.__cause__ = error
    return later


@pytest.mark.parametrize("wrap", [lambda e: e, as_a_task, as_a_worker, chained])
def test_a_storage_error_is_found_in_what_ray_makes_of_it(wrap) -> None:
    for error in (FULL, ShardError("shard x is damaged")):
        assert str(storage_error(wrap(error))) == str(error)
    assert storage_error(wrap(ValueError("no"))) is None


def test_a_chain_that_leads_back_to_itself_ends() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert storage_error(first) is None
    first.__cause__ = first
    assert storage_error(first) is None


@pytest.mark.parametrize("wrap", [lambda e: e, as_a_task, as_a_worker])
def test_the_command_line_prints_it_as_one_line(
    wrap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise wrap(FULL)

    monkeypatch.setattr(pipeline.run, "parse_command", fail)
    with pytest.raises(SystemExit) as ended:
        pipeline.run.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the disk is full\n"
