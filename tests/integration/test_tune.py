"""Searches on a real Ray cluster, small: results, failures, interruptions."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden
import pytest
import ray
from upath import UPath

from pipeline.cli import parse_command
from pipeline.errors import StageError
from pipeline.graph import Run
from pipeline.observe.progress import read_rows
from pipeline.stages.distill import Distill
from pipeline.stages.plan import shard_bytes
from pipeline.stages.pretrain import PretrainJob, pretrain_member
from pipeline.stages.shard import Shard
from pipeline.stages.tune import Tune
from pipeline.stages.tuning import TUNE_VERSION
from pipeline.stages.tuning.board import Board, Table
from pipeline.stages.tuning.ray_tune import Halving, error_line
from pipeline.stages.tuning.search import build_sampler
from pipeline.stages.tuning.search_space import override
from pipeline.stages.tuning.trial import SweepJob, input_key, run_trial

ROOT = Path(__file__).parents[2]
PRESET = """
[source]
selection_fraction = 0.2
[shard]
image_size = 16
[model]
depth = 2
width = 8
[pretrain]
networks = 1
[pretrain.training]
epochs = 1
[distill]
num_steps = 9
real_batch = 8
[frequencies]
num_freqs = 64
num_components = 4
[evaluate.training]
batch_size = 16
[runtime]
log_every = 1
checkpoint_every_s = 0.0
checkpoint_share = 1.0
[tune]
samples = 2
epochs = 3
cpus_per_trial = 0.5
retries = 1
[tune.space."distill.lr"]
loguniform = [1e-3, 1e-1]
"""
IPC = "[tune.space.ipc]\ngrid = [1, 2]\n"
# Frequencies so large overflow.
FAILURES = """
[tune.space."frequencies.sigma"]
grid = [1.0, 1e39]
"""


def run(folder: Path, name: str, more: str, *options: str) -> Run:
    preset = folder / f"{name}.toml"
    preset.write_text(PRESET + more)
    storage = ["--storage_path", str(folder / "runs")]
    found = Run(parse_command(["tune", "--config", str(preset), *storage, *options]))
    found.start()
    return found


def results(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / name / "tune/results.json").read_text())
    return found


def without_times(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found["trials"]]


@pytest.fixture(scope="module")
def swept(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished search, `sweep`, over two sizes."""
    folder = tmp_path_factory.mktemp("tune")

    def pretrain_here(job: PretrainJob, *_: object, **__: object) -> dict[str, Any]:
        pretrain_member((job, 0), 1, "cpu")
        return {"networks": 1}

    with pytest.MonkeyPatch.context() as patch:  # the pool without Ray Train, which takes its time
        patch.setattr("pipeline.stages.pretrain.pretrain", pretrain_here)
        run(folder, "sweep", IPC).perform(("tune",))
    return folder


def test_the_results_are_there(swept: Path) -> None:
    directory, found = swept / "runs" / "sweep", results(swept, "sweep")
    rows = found["trials"]
    assert [row["values"]["ipc"] for row in rows] == [1, 2, 1, 2]
    assert [row["stored_bytes"] for row in rows] == [7680, 15360, 7680, 15360]
    assert {row["status"] for row in rows} <= {"finished", "stopped"}
    assert [row["status"] for row in rows[:2]] == ["finished"] * 2, "the first has no rival"
    for row in rows:
        assert [step for step, _ in row["rungs"]] == [1, 3, 9][: len(row["rungs"])]
        assert row["accuracy"] == row["rungs"][-1][1]
    with (directory / "tune/results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["distill.lr"]) for line in table] == [
        r["values"]["distill.lr"] for r in rows
    ]
    assert [float(line["accuracy"]) for line in table] == [row["accuracy"] for row in rows]
    accuracies = {f"trial {i}": [a for _, a in row["rungs"]] for i, row in enumerate(rows)}
    golden.check("tune", TUNE_VERSION, accuracies, tolerance=0.05)
    assert len(list((directory / "tensorboard").glob("trial-*/events.*"))) >= 4
    page = (directory / "report.html").read_text()
    assert 'id="search"' in page
    for title in ("Trials", "Values and accuracy", "Accuracy against size"):
        assert f"<h3>{title}</h3>" in page


def test_nothing_is_judged_on_val_and_select_is_no_part_of_train(swept: Path) -> None:
    """The select images are those that the source holds out, and the accuracies count in them."""
    manifest = next((swept / "runs/cache").glob("shard-*/manifest.json"))
    counts = {s: sum(p["counts"]) for s, p in json.loads(manifest.read_text())["splits"].items()}
    assert counts["train"] + counts["select"] == 2000
    assert 300 < counts["select"] < 500
    for row in results(swept, "sweep")["trials"]:
        correct = row["accuracy"] * counts["select"]
        assert correct == pytest.approx(round(correct), abs=1e-6)


def test_the_best_preset_is_the_trial(swept: Path) -> None:
    found = results(swept, "sweep")
    best = swept / "runs/sweep/tune/best.toml"
    config = parse_command(["--config", str(best)]).config
    base = run(swept, "sweep", IPC).config
    wanted = override(base, found["trials"][found["best"]]["values"])
    for part in ("ipc", "source", "distill", "frequencies", "evaluate", "storage_path"):
        assert getattr(config, part) == getattr(wanted, part)
    assert config.tune.space == {}
    assert config.run_directory != base.run_directory
    for number in found["pareto"][:-1]:
        assert (best.parent / f"trial-{number:03d}.toml").exists()


def test_an_interrupted_search_goes_on_from_its_rungs(swept: Path) -> None:
    """As if it had been killed: two trials lack their last rung, and there is no manifest."""
    whole, directory = results(swept, "sweep"), swept / "runs" / "sweep" / "tune"
    (directory / "manifest.json").unlink()
    kept = {}
    for trial in sorted((directory / "trials").iterdir()):
        if trial.name.startswith(("000", "003")):
            max(trial.glob("rung-*.json")).unlink()
        kept |= {path: path.stat().st_mtime_ns for path in trial.glob("rung-*.json")}
    run(swept, "sweep", IPC).perform(("tune",))
    assert without_times(results(swept, "sweep")) == without_times(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.long
def test_a_larger_search_keeps_the_trials_of_the_smaller(swept: Path) -> None:
    before = without_times(results(swept, "sweep"))
    first = next((swept / "runs/sweep/tune/trials").glob("000-*/rung-0.json")).stat().st_mtime_ns
    run(swept, "sweep", IPC, "--tune.samples", "3").perform(("tune",))
    assert without_times(results(swept, "sweep"))[:4] == before
    after = next((swept / "runs/sweep/tune/trials").glob("000-*/rung-0.json")).stat().st_mtime_ns
    assert after == first


def test_what_would_only_fail_again_is_a_result(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the rungs are reported, or a failure, that no retry follows."""
    found = run(swept, "sweep", IPC)
    inputs = {input_key({}): found.stage(Distill).job}
    sweep = SweepJob(name="x", config=found.config, directory=UPath(tmp_path), inputs=inputs)
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    values = json.dumps({"frequencies.sigma": 1e39})
    run_trial({"number": 7, "values": values}, sweep=sweep, device="cpu")
    assert [set(report) for report in reports] == [{"number", "failure"}]
    assert "not finite" in reports[0]["failure"]


def test_a_trial_that_failed_for_good_is_counted_and_the_others_go_on(
    swept: Path, tmp_path: Path
) -> None:
    """The scheduler, told by hand what Ray Tune would tell it."""
    found = run(swept, "sweep", IPC)
    inputs = {input_key({}): found.stage(Distill).job}
    sweep = SweepJob(name="x", config=found.config, directory=UPath(tmp_path), inputs=inputs)
    board = Board(sweep, build_sampler(found.config, UPath(tmp_path)))
    halving = Halving(board, Table(board))
    (tmp_path / "error.txt").write_text("Failure # 1 (now)\nTraceback:\nValueError: no room\n")

    def trial(number: int, *, recovers: bool = False) -> Any:
        made = SimpleNamespace(
            config={"number": number},
            status="RUNNING",
            error_file=tmp_path / "error.txt",
            should_recover=lambda: recovers,
        )
        halving.on_trial_add(None, made)
        return made

    def tell(made: Any, step: int, accuracy: float) -> str:
        extra = {"accuracies": [accuracy], "seconds": 1.0, "peak_rss_bytes": 1}
        number = made.config["number"]
        result = {"number": number, "step": step, "accuracy": accuracy, **extra}
        return halving.on_trial_result(controller, made, result)

    asked: list[Any] = []
    controller = SimpleNamespace(request_stop_trial=asked.append)
    first, second, third = trial(0), trial(2), trial(1)  # 0 and 2 store one image a class, 1 two
    assert tell(second, 1, 0.2) == "CONTINUE", "it may yet be stopped: trial 0 decides"
    halving.on_trial_error(controller, trial(0, recovers=True))
    assert board.failed == {}, "it is tried again"
    assert tell(first, 1, 0.9) == "CONTINUE"
    assert asked == [second], "now it is known"
    halving.on_trial_error(controller, third)
    assert board.failed == {1: "ValueError: no room"}
    assert [row["status"] for row in board.rows()] == ["running", "failed", "stopped", "running"]
    assert board.unended() == [0, 3]


@pytest.mark.long
def test_failed_trials_are_told_and_the_others_count(
    swept: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = run(swept, "failures", FAILURES, "--tune.samples", "1")
    failures.perform(("tune",))
    manifest = failures.stage(Tune).manifest
    assert [row["status"] for row in manifest["trials"]] == ["finished", "failed"]
    error = manifest["trials"][1]["error"]
    assert "not finite" in error
    assert "\n" not in error
    out, _ = capfd.readouterr()
    assert "1 finished, 0 stopped, 1 failed" in out
    assert "trial 1 failed: " in out
    assert "\x1b" not in out
    assert manifest["pareto"] == [0]


def test_a_search_without_a_success_is_an_error(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_all(board: Board, waiting: list[int], *_: object, **__: object) -> None:
        board.failed = {board.suggest(n) and n: "ValueError: no room" for n in waiting}

    monkeypatch.setattr("pipeline.stages.tuning.ray_tune._run", fail_all)
    failing = run(swept, "hopeless", IPC)
    with pytest.raises(StageError, match=r"no trial succeeded; the first: ValueError: no room"):
        failing.perform(("tune",))
    assert not (failing.directory / "tune" / "manifest.json").exists()


def test_why_a_trial_failed_is_one_line() -> None:
    trace = "Traceback (most recent call last):\n  File x\nOSError: old\n\nValueError: no\n  room\n"
    assert error_line(f"Failure # 1 (at noon)\nKeyError: 1\nFailure # 2 (at one)\n{trace}") == (
        "ValueError: no"
    )
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: X\n"
    assert error_line(f"Failure # 1 (at noon)\n{died}") == died.splitlines()[0]


def test_plan_predicts_the_shards(swept: Path) -> None:
    """Here, where there are some."""
    found = run(swept, "sweep", IPC)
    splits = found.stage(Shard).manifest["splits"].values()
    made = sum(entry["bytes"] for part in splits for entry in part["shards"])
    assert shard_bytes(found.config, found.source) == pytest.approx(made, rel=0.1)


def test_a_trial_tells_its_steps_and_rungs(swept: Path) -> None:
    path = next((swept / "runs/sweep/tune/trials").glob("000-*/metrics.jsonl"))
    rows = read_rows(path)
    assert [r["step"] for r in rows if r["stage"] == "tune"] == [1, 3, 9]
    assert [r["step"] for r in rows if r["stage"] == "distill"] == list(range(1, 10))


# ------------------------------------------------------------------ long


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_at_three_moments_it_ends_the_same(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the driver, and at once the same command again, while its trials still die."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    preset = swept / "killed.toml"
    preset.write_text(PRESET.replace("num_steps = 9", "num_steps = 90") + IPC)
    storage = ["--storage_path", str(swept / "runs"), "--tune.samples", "3"]

    def start(name: str) -> subprocess.Popen[bytes]:
        script = [sys.executable, str(ROOT / "pipeline/run.py"), "tune", "--config", str(preset)]
        with (swept / "killed.log").open("ab") as log:
            return subprocess.Popen([*script, *storage, "--name", name], stdout=log, stderr=log)

    def rungs(name: str) -> int:
        return len(list((swept / "runs" / name / "tune/trials").glob("*/rung-*.json")))

    undisturbed = start("undisturbed")
    assert undisturbed.wait(400) == 0
    total = sum(len(row["rungs"]) for row in results(swept, "undisturbed")["trials"])
    for moment in (1, total // 2, total - 2):
        process = start("killed")
        deadline = time.monotonic() + 300
        while rungs("killed") < moment:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert start("killed").wait(400) == 0
    whole, resumed = (without_times(results(swept, name)) for name in ("undisturbed", "killed"))
    assert resumed == whole
    assert {row["status"] for row in whole} == {"finished", "stopped"}
    log = (swept / "killed.log").read_bytes()
    assert b"select %" in log
    assert b"\x1b" not in log, "a job's log has no escape codes"
