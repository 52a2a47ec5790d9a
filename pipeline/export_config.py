"""Options of the export stage, apart from what it imports."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["imagefolder", "webdataset", "parquet"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the export stage writes."""

    to: Format = "parquet"
    """imagefolder: train/<class>/<n>.png. webdataset: tar shards. parquet: as the Hugging Face hub
    shows it. `--to` is short for it."""
