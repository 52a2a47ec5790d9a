"""Data sets on the Hugging Face hub, through huggingface_hub, which is an optional package.

Its environment variables apply: HF_TOKEN, HF_HOME (the cache), HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?")
"""owner/name, or owner/name@revision."""


def download(
    repository: str, patterns: Sequence[str], check: Callable[[list[str]], None] | None = None
) -> Path:
    """Download the files of a data set that match a pattern; returns the folder of its revision in
    the cache, which is named after the commit.

    Only files that are not in the cache are downloaded. If the hub cannot be reached and the cache
    is complete, it is used as it is. `check` gets the files' names first and may raise an error.
    Raises ImportError without huggingface_hub, ValueError on a malformed name, and OSError or an
    HTTP error of that package if there is no such data set.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError
    except ImportError as error:
        raise ImportError(f"{repository} is on the Hugging Face hub, which needs the package "
            "huggingface_hub: pip install huggingface_hub") from error  # fmt: skip
    if (match := REPOSITORY.fullmatch(repository)) is None:
        raise ValueError(f"expected owner/name or owner/name@revision, got {repository!r}")
    arguments: dict[str, Any] = {"repo_id": match[1], "revision": match[2]}
    arguments |= {"repo_type": "dataset", "allow_patterns": list(patterns)}
    if check is not None:
        # Where the hub cannot be reached, the call below looks in the cache, or raises the reason.
        with suppress(DryRunError):
            check([file.filename for file in snapshot_download(**arguments, dry_run=True)])
    return Path(snapshot_download(**arguments))


def upload(folder: Path, repository: str, *, replaces: str) -> str:
    """Upload a folder to a data set, which is private if it is new; returns its address.

    Files of the data set that match the pattern `replaces` and are not in the folder are deleted.
    The token is $HF_TOKEN. Raises KeyError without one.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=os.environ["HF_TOKEN"])
    address = api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repository, repo_type="dataset", folder_path=folder, delete_patterns=replaces
    )
    return str(address)
