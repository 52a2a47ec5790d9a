"""Stage export: the distilled set in a format that others read, in export/ of the run."""

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
    """What the export stage writes."""

    to: Format = "parquet"
    """imagefolder: train/<class>/<n>.png. webdataset: tar shards. parquet: as the Hugging Face hub
    shows it. `--to` is short for it."""


class Export(Action):
    """The set with soft labels if there is one, else with hard ones."""

    name = "export"

    def perform(self) -> None:
        """See Action."""
        from pipeline.stages.export_formats import export  # pyarrow takes its time

        soft, to = self.config.curate.soft_labels, self.config.export.to
        _ = self.run.stage(Curate if soft else Distill).manifest
        directory = self.run.directory
        evaluation = read_json(directory / "evaluation.json") or {}
        made = export(
            load(directory / ("curated" if soft else "distilled")),
            directory / "export" / to,
            to,
            name=directory.name,
            rows=evaluation.get("rows", []),
        )
        log(f"export: {made}")
