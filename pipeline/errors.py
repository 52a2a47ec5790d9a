"""Errors with one-line messages: what is wrong, where, and what to do."""


class UsageError(Exception):
    """The command line or the configuration is invalid; the one-line message names the option and
    the valid values.
    """


class StageError(Exception):
    """A stage cannot be completed; the one-line message gives the reason."""


class WorkerError(StageError):
    """A worker or a task failed and is not retried.

    `details` is the traceback, for a file in the run's directory.
    """

    def __init__(self, line: str, details: str) -> None:
        super().__init__(line)
        self.details = details


class SourceError(ValueError):
    """A source is invalid; the one-line message gives the problem, the place and the remedy."""


class StorageError(OSError):
    """A disk or an object store failed; it says nothing about the file being read."""


class StoreError(StorageError):
    """A store cannot be built here, and a retry would not help. The message is one line."""


class ShardError(StorageError):
    """A shard is missing or damaged; the message names the file and the remedy."""


def missing_package(option: str, extra: str) -> UsageError:
    """The error for an option that needs an uninstalled extra of pyproject.toml."""
    return UsageError(
        f"{option} needs the extra {extra}: `uv run --extra {extra} pipeline/run.py ...`, "
        f"or `pip install '.[{extra}]'` in a checkout"
    )
