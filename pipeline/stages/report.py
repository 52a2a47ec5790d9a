"""Stage report: report.html of whatever the run's directory holds."""

from pipeline.errors import UsageError
from pipeline.graph import Action, log

NEEDED = ("distilled/manifest.json", "tune/results.json")  # one of them


class Report(Action):
    """The report of a run, in its directory."""

    name = "report"

    def perform(self) -> None:
        """See Action."""
        from pipeline.observe.reporting.report import write_report  # plotly takes its time

        directory = self.run.directory
        if not any((directory / name).exists() for name in NEEDED):
            raise UsageError(f"nothing to report in {directory} yet: run distill first")
        log(f"report: {write_report(directory)}")
