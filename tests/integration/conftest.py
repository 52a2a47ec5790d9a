import os
import re
import sys
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from raylets import end, start, wait_for_text
from tiny import run
from upath import UPath


@pytest.fixture(scope="session")
def tiny(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished tiny run: (folder, run directory)."""
    folder = tmp_path_factory.mktemp("pipeline")
    directory, _ = run(folder, "--num_workers", "2")
    return folder, directory


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server on this machine; empty if none is installed."""
    if find_spec("moto") is None or find_spec("s3fs") is None:
        yield {}
        return
    log = tmp_path_factory.mktemp("s3") / "log"
    server = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    process = start(server, os.environ, log)
    try:
        wait_for_text(log, "Running on ", process)
        address = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert address
        yield {
            "AWS_ENDPOINT_URL": address[0],
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "a secret",
        }
    finally:
        end(process)


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> UPath:
    """An empty bucket."""
    if not s3:
        pytest.skip("needs the packages moto and s3fs")
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    made = UPath(f"s3://{uuid.uuid4().hex}", use_listings_cache=False)
    made.mkdir()
    return made
