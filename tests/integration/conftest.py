from pathlib import Path

import pytest
from tiny import run


@pytest.fixture(scope="session")
def tiny(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished tiny run: (folder, run directory)."""
    folder = tmp_path_factory.mktemp("pipeline")
    directory, _ = run(folder, "--num_workers", "2")
    return folder, directory
