"""Distil a data set: python pipeline/run.py [STAGE] [--config PRESET.toml] [--key.sub VALUE]."""

import sys

from upath import UPath

from pipeline.cli import exit_with_usage_error, parse_command
from pipeline.errors import SourceError, StageError, UsageError, WorkerError
from pipeline.runtime.files import write_atomic


def main() -> None:
    """Run the command line."""
    directory: UPath | None = None
    try:
        if sys.argv[1:2] == ["compare"]:
            from pipeline.observe.reporting.compare import compare_command

            print(compare_command(sys.argv[2:]))  # noqa: T201
            return
        command = parse_command(sys.argv[1:])
        directory = command.config.run_directory
        from pipeline.graph import Run  # slow to import: not needed by --help and usage errors

        Run(command).perform(command.stages)
    except (UsageError, SourceError) as error:
        exit_with_usage_error(error)
    except StageError as error:
        sys.exit(f"error: {error}{_traceback_file(directory, error)}")
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Exception as error:
        from pipeline.runtime.failures import storage_error, worker_error

        if (storage := storage_error(error)) is not None:
            exit_with_usage_error(storage)
        if "ray" not in sys.modules or (failure := worker_error(error)) is None:
            raise
        sys.exit(f"error: {failure}{_traceback_file(directory, failure)}")


def _traceback_file(directory: UPath | None, error: StageError) -> str:
    """Write a worker's traceback to the run's directory; returns a note of the path."""
    if directory is None or not isinstance(error, WorkerError):
        return ""
    path = directory / "error.txt"
    write_atomic(path, error.details)
    return f" (traceback: {path})"


if __name__ == "__main__":
    main()
