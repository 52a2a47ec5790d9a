"""Rows of metrics on their way out: TensorBoard, MLflow, Prometheus, and the dashboard on them."""

import json
import logging
import re
import struct
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from ncfm.objectives import OBJECTIVES
from pipeline.cli import parse_command
from pipeline.errors import UsageError
from pipeline.graph import Run
from pipeline.observe.reporting.charts import DISTILL
from pipeline.observe.tracking import GAUGES, TrackedRun, Trackers, TrackingConfig
from pipeline.runtime.identity import dotted

ROOT = Path(__file__).parents[2]


def tracked(folder: Path, **config: Any) -> TrackedRun:
    return TrackedRun(
        config=TrackingConfig(**config),
        name="a-run",
        identity="0123456789abcdef",
        tensorboard=UPath(folder / "tensorboard"),
        directory=UPath(folder),
        options={"distill.lr": 0.01},
    )


def row(step: int, ncfd: float) -> dict[str, Any]:
    return {"stage": "distill", "step": step, "time": 1e9 + step, "distill/ncfd": ncfd}


def scalars(directory: Path) -> list[tuple[int, str, float]]:
    """All values of the event files, read as TensorFlow's records: length, CRC, event, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.glob("events.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (size,) = struct.unpack_from("<Q", data, offset)
            event = Event.FromString(data[offset + 12 : offset + 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            offset += 16 + size
    return found


def test_tensorboard_has_the_rows(tmp_path: Path) -> None:
    trackers = Trackers(tracked(tmp_path), 0)
    trackers.log(row(10, 0.5))
    trackers.log(row(20, 0.25))
    trackers.close()
    assert scalars(tmp_path / "tensorboard") == [
        (10, "distill/ncfd", 0.5),
        (20, "distill/ncfd", 0.25),
    ]


def test_no_tracking_leaves_nothing(tmp_path: Path) -> None:
    for trackers in (Trackers(None, 0), Trackers(tracked(tmp_path, tensorboard=False), 0)):
        trackers.log(row(1, 1.0))
        trackers.close()
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_is_given_up_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        rows = 0

        def log(self, row: Mapping[str, Any]) -> None:
            Broken.rows += 1
            raise ConnectionError("the server is away")

        def close(self) -> None:
            raise AssertionError("it was given up")

    monkeypatch.setattr(TrackedRun, "open", lambda self, step: [Broken()])
    trackers = Trackers(tracked(tmp_path), 0)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            trackers.log(row(step, 1.0))
        trackers.close()
    assert Broken.rows == 1
    assert "the server is away" in caplog.text


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_a_missing_package_is_a_usage_error(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.observe.tracking.find_spec", lambda name: None)
    command = parse_command([f"--tracking.{package}", "x", "--storage_path", str(tmp_path)])
    with pytest.raises(UsageError, match=rf"uv run --extra {package} pipeline"):
        Run(command).perform(("distill",))


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for step in (10, 20):  # the second time as after an interruption
        trackers = Trackers(tracked(tmp_path, tensorboard=False, mlflow=uri), step - 10)
        trackers.log(row(step, step / 100))
        trackers.close()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("ncfm")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"distill.lr": "0.01"}
    history = client.get_metric_history(run.info.run_id, "distill/ncfd")
    assert [(m.step, m.value) for m in history] == [(10, 0.1), (20, 0.2)]


def test_a_server_that_cannot_be_is_a_usage_error(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    command = parse_command(["--tracking.mlflow", "gopher://x", "--storage_path", str(tmp_path)])
    with pytest.raises(UsageError, match=r"tracking.mlflow gopher://x cannot be used: .*gopher"):
        Run(command).perform(("distill",))


def test_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    trackers = Trackers(tracked(tmp_path, tensorboard=False, wandb="project"), 0)
    trackers.log(row(10, 0.5))
    trackers.close()
    assert list(tmp_path.glob("wandb/offline-run-*-0123456789abcdef/*.wandb"))
    assert caplog.text == "", "neither given up nor left open"


def test_dotted() -> None:
    assert dotted({"a": 1, "b": {"c": 2, "d": {"e": None}}}) == {"a": 1, "b.c": 2, "b.d.e": None}


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"\b(?:ray_)?ncfm_\w+", target["expr"])
            assert found, f"panel {panel['title']} asks for nothing of ours"
            asked |= set(found)
    asked |= set(re.findall(r"\bray_ncfm_\w+", json.dumps(dashboard["templating"])))
    assert asked == {f"ray_{name}" for name, _ in GAUGES.values()}


def test_every_objective_is_charted_and_tracked_by_its_name() -> None:
    objectives = {f"distill/{name}" for name in OBJECTIVES}
    assert objectives >= {"distill/ncfd", "distill/mmd"}
    assert objectives <= GAUGES.keys()
    assert objectives <= DISTILL.keys()
    others = {"distill/psi_objective", "distill/calibration", "distill/images_per_s"}
    assert DISTILL.keys() == objectives | others  # and there is no chart of what is never logged


@pytest.mark.long
def test_the_gauges_reach_prometheus(ray_cluster: str, tmp_path: Path) -> None:
    import ray

    trackers = Trackers(tracked(tmp_path, tensorboard=False), 0)
    trackers.log({**row(10, 0.125), "distill/imbalance": 1.5})
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, text = time.monotonic() + 60, ""
    while "ray_ncfm_ncfd{" not in text and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
    values = dict(re.findall(r'^(ray_ncfm_\w+)\{.*run="a-run".*\} (\S+)', text, re.MULTILINE))
    assert float(values["ray_ncfm_ncfd"]) == 0.125
    assert float(values["ray_ncfm_worker_imbalance"]) == 1.5
    assert float(values["ray_ncfm_step"]) == 10
