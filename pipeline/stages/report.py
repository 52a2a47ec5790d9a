"""Stage report: report.html from the contents of the run directory."""

from pipeline.errors import UsageError
from pipeline.graph import Action, log

NEEDED = ("distilled/manifest.json", "tune/results.json")  # at least one


class Report(Action):
    """The report of a run, in the run directory."""

    name = "report"

    def perform(self) -> None:
        """See Action."""
        from pipeline.observe.reporting.report import write_report  # plotly is slow to import

        directory = self.run.directory
        if not any((directory / name).exists() for name in NEEDED):
            raise UsageError(f"nothing to report in {directory} yet: run distill first")
        log(f"report: {write_report(directory)}")
