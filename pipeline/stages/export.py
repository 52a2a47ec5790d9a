"""Stage export: write the distilled set in a standard format to export/ of the run."""

from dataclasses import dataclass
from typing import Literal

from ncfm import load
from pipeline.graph import Action, log
from pipeline.runtime.files import read_json
from pipeline.stages.curate import Curate
from pipeline.stages.distill import Distill

Format = Literal["imagefolder", "webdataset", "parquet"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Format of the exported set."""

    to: Format = "parquet"
    """imagefolder: train/<class>/<n>.png. webdataset: tar shards. parquet: as on the Hugging Face
    hub. Short form: `--to`."""


class Export(Action):
    """Export of the set with soft labels if the run has one, else with hard labels."""

    name = "export"

    def perform(self) -> None:
        """See Action."""
        from pipeline.stages.export_formats import export  # pyarrow is slow to import

        soft, to = self.config.curate.soft_labels, self.config.export.to
        _ = self.run.stage(Curate if soft else Distill).manifest
        directory = self.run.directory
        evaluation = read_json(directory / "evaluation.json") or {}
        path = export(
            load(directory / ("curated" if soft else "distilled")),
            directory / "export" / to,
            to,
            name=directory.name,
            rows=evaluation.get("rows", []),
        )
        log(f"export: {path}")
