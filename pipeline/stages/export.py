"""Stage export: the distilled set in a standard format, in export/ of the run or uploaded."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from upath import UPath

from ncfm import load
from ncfm.hub import REPOSITORY, upload
from pipeline.errors import StageError, UsageError, missing_package
from pipeline.graph import Action, log
from pipeline.runtime.files import read_json
from pipeline.stages.curate import Curate
from pipeline.stages.distill import Distill

Format = Literal["imagefolder", "webdataset", "parquet"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Format of the exported set, and where it goes."""

    to: Format = "parquet"
    """imagefolder: train/<class>/<n>.png. webdataset: tar shards. parquet: as on the Hugging Face
    hub. Short form: `--to`."""
    push: str | None = None
    """Data set of the Hugging Face hub, owner/name, to upload the export to; it is private if it is
    new. The token is that of the environment variable HF_TOKEN. Its manifest.json and its card have
    the options of the run, with paths of this machine. Short form: `--push`."""
    dry_run: bool = False
    """With push: only list the files that would be uploaded, and their sizes."""

    def __post_init__(self) -> None:
        match = REPOSITORY.fullmatch(self.push or "owner/name")
        if match is None or match[2]:
            raise ValueError(f"export.push must be owner/name, got {self.push!r}")


class Export(Action):
    """Export of the set with soft labels if the run has one, else with hard labels."""

    name = "export"

    def check(self) -> None:
        """See Action."""
        if self.config.export.push and not self.config.export.dry_run:
            if find_spec("huggingface_hub") is None:
                raise missing_package("export.push", "hf")
            if not os.environ.get("HF_TOKEN"):
                raise UsageError(
                    "export.push needs a token with write access in the environment variable "
                    "HF_TOKEN; --export.dry_run true lists what would be uploaded"
                )

    def perform(self) -> None:
        """See Action."""
        from pipeline.stages.export_formats import FILES, export  # pyarrow is slow to import

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
        if (repository := self.config.export.push) is not None:
            push(path, repository, dry_run=self.config.export.dry_run, replaces=FILES[to])


def push(directory: UPath, repository: str, *, dry_run: bool, replaces: str) -> None:
    """List the files of an export and, unless it is a dry run, upload them. Raises StageError."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        log(f"  {size:>13,}  {path.relative_to(directory)}")
    log(f"{'would upload' if dry_run else 'uploading'} {len(files)} files, {sum(sizes):,} bytes, "
        f"to the data set {repository}")  # fmt: skip
    if dry_run:
        return
    with TemporaryDirectory() as copy:
        if not isinstance(directory, Path):
            directory.fs.get(f"{directory.path}/", copy, recursive=True)
        folder = directory if isinstance(directory, Path) else Path(copy)
        try:
            log(f"uploaded: {upload(folder, repository, replaces=replaces)}")
        except Exception as error:  # of the HTTP library or of the hub
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise StageError(f"cannot upload to {repository}: {reason}") from error
