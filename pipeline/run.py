"""Distil a data set: python pipeline/run.py [STAGE] [--config PRESET.toml] [--key.sub VALUE]."""

import sys

from pipeline.config import UsageError, exit_with_usage_error, parse_command
from pipeline.sources import SourceError
from pipeline.stage import StageError


def main() -> None:
    """Run the stages that the command line asks for."""
    try:
        if sys.argv[1:2] == ["compare"]:
            from pipeline.reporting.compare import compare_command

            print(compare_command(sys.argv[2:]))  # noqa: T201
            return
        command = parse_command(sys.argv[1:])
        if command.stages == ("clean",):
            from pipeline.data.local import clean_command

            print(clean_command(command.config))  # noqa: T201
            return
        from pipeline.stages import (
            Run,
        )  # after the parsing: --help and a wrong option need none of this

        run = Run(command)
        if command.stages != ("plan",):  # which writes nothing
            run.start()
        stages = run.stages()
        for name in command.stages:
            stages[name]()
    except (UsageError, SourceError) as error:
        exit_with_usage_error(error)
    except StageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Exception as error:
        from pipeline.workers import storage_error

        if (storage := storage_error(error)) is None:
            raise
        exit_with_usage_error(storage)


if __name__ == "__main__":
    main()
