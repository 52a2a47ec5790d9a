"""Source hf: a data set of the Hugging Face hub, or a local copy of one, in Parquet files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ncfm.hub import REPOSITORY, download
from pipeline.data.sources.data_files import SPLIT_NAME
from pipeline.data.sources.parquet import ParquetSource
from pipeline.errors import SourceError, missing_package

if TYPE_CHECKING:
    from pipeline.data.sources import SourceConfig

PATH = "a data set of the Hugging Face hub, owner/name or owner/name@revision, or a folder"
OPTIONS = ("subset", "image", "label", "class_names")


def open_source(config: "SourceConfig") -> ParquetSource:
    """See Kind. A folder is read where it is; else the driver downloads the Parquet files to the
    hub's cache ($HF_HOME), which all nodes must reach, as they must any other source.path.
    """
    assert config.path is not None
    folder, commit = Path(config.path).expanduser(), None
    files = f"{config.subset}/*.parquet" if config.subset else "*.parquet"
    if not folder.exists():
        if REPOSITORY.fullmatch(config.path) is None:
            raise SourceError(
                f"source.path {config.path} is neither a folder nor owner/name of the hub"
            )
        try:
            folder = download(config.path, [files], _refuse_several_subsets)
        except ImportError as error:
            raise missing_package("source.kind hf", "hf") from error
        commit = folder.name
    names = [str(path.relative_to(folder)) for path in folder.rglob(files)]
    if not names:
        raise SourceError(
            f"source.path {config.path} has no {files}; most data sets of the hub that are packed "
            "otherwise are there as Parquet, too: owner/name@refs/convert/parquet"
        )
    _refuse_several_subsets(names)
    folder /= config.subset or ""
    return ParquetSource(replace(config, kind="parquet", path=str(folder), subset=None), commit)


def _refuse_several_subsets(names: Sequence[str]) -> None:
    """Raise SourceError if the files are in several folders that are not those of splits."""
    folders = {name.partition("/")[0] for name in names if "/" in name}
    if len(subsets := sorted(f for f in folders if not SPLIT_NAME.match(f))) > 1:
        raise SourceError(
            f"the data set has several subsets: name one with --source.subset: {', '.join(subsets)}"
        )
