"""Errors whose message is one line: what is wrong, where, and what to do."""


class UsageError(Exception):
    """The command line or the configuration is wrong; the message is one line that says what,
    where, and what fits.
    """


class StageError(Exception):
    """A stage cannot be completed; the message is one line that says why."""


class WorkerError(StageError):
    """A worker or a task failed, and was not started again, or not any more.

    `details` is the traceback, for a file beside the run.
    """

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


class SourceError(ValueError):
    """A source is not as it must be. The message is one line: what, where, what would be right."""


class StorageError(OSError):
    """A disk or an object store failed: nothing is known about the image that was to be read."""


class StoreError(StorageError):
    """A store cannot be made here; to try again would not help. The message is one line."""


class ShardError(StorageError):
    """A shard is missing or damaged; the message names the file and says what to do."""


def missing_package(option: str, extra: str) -> UsageError:
    """The error of an option that needs an extra of pyproject.toml which is not installed."""
    return UsageError(
        f"{option} needs the extra {extra}: `uv run --extra {extra} pipeline/run.py ...`, "
        f"or `pip install '.[{extra}]'` in a checkout"
    )
