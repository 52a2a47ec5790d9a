import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before Ray is imported: under `uv run` it would start every worker through `uv run` again.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

# A loaded machine is no failure: pytest-timeout has the last word.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image sets, which are no part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the image sets in {SHARED_DATA}, which is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A small Ray cluster of this session's own; the address of its dashboard."""
    import ray

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dashboard = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_API_SERVER_ADDRESS", dashboard)  # Tune asks it; see ray issue 54305
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=256 * 2**20,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield dashboard
        finally:
            ray.shutdown()
