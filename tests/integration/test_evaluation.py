"""The evaluation stage: protocols by name, many networks, more repeats, any number of workers."""

import json
import re
from pathlib import Path

import pytest
from tiny import copied, stage

from pipeline.cli import parse_command
from pipeline.errors import UsageError
from pipeline.graph import Run
from pipeline.runtime.tasks import thread_shares
from pipeline.runtime.workers import Workers
from pipeline.stages.evaluate import rows_of
from pipeline.stages.network_stage import evaluation_task
from pipeline.stages.networks import run_tasks
from pipeline.stages.protocols import PROTOCOLS, protocol_changes


def config_of(*arguments: str):  # type: ignore[no-untyped-def]
    return parse_command(list(arguments)).config


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_protocol_on_the_command_line_is_whole(name: str) -> None:
    """The built-in preset says otherwise in most of its fields."""
    config = config_of("--evaluate.protocol", name)
    assert config.evaluate == PROTOCOLS[name].evaluate  # type: ignore[index]
    assert config.curate == PROTOCOLS[name].curate  # type: ignore[index]
    assert protocol_changes(config.evaluate, config.curate) == []


def test_options_beside_a_protocol_override_it(tmp_path: Path) -> None:
    config = config_of("--evaluate.training.epochs", "7", "--evaluate.protocol=paper")
    assert config.evaluate.training.epochs == 7
    assert config.evaluate.best_on_test_every == 100
    assert protocol_changes(config.evaluate, config.curate) == ["evaluate.training.epochs"]
    preset = tmp_path / "some.toml"
    preset.write_text('[evaluate]\nprotocol = "quick"\nrepeats = 4\n')
    config = config_of("--config", str(preset))
    assert config.evaluate.repeats == 4
    assert config.evaluate.training == PROTOCOLS["quick"].evaluate.training
    overridden = config_of("--config", str(preset), "--evaluate.protocol", "soft")
    assert overridden.evaluate == PROTOCOLS["soft"].evaluate
    with pytest.raises(UsageError, match=r"evaluate\.protocol.*paper.*papper"):
        config_of("--evaluate.protocol", "papper")
    with pytest.raises(UsageError, match=r"sets must name one or more, each once.*'random'"):
        config_of("--evaluate.sets", '["random", "random"]')


def test_a_written_configuration_gives_itself_again(tmp_path: Path) -> None:
    command = parse_command(["--evaluate.protocol", "paper", "--evaluate.repeats", "2"])
    (tmp_path / "config.toml").write_text(command.toml)
    assert config_of("--config", str(tmp_path / "config.toml")) == command.config


def test_more_repeats_are_added(tiny: tuple[Path, Path]) -> None:
    folder, directory = copied(tiny, "repeats")
    results = folder / "runs" / "cache" / "evaluate"
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    more = stage(folder, directory, "evaluate", "--evaluate.repeats", "3")["rows"]
    first = json.loads((tiny[1] / "evaluation.json").read_text())["rows"]
    assert [row["accuracy"][:2] for row in more] == [row["accuracy"] for row in first]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(results.glob("*.json"))) == len(before) + len(more)
    fewer = stage(folder, directory, "evaluate", "--evaluate.whole_repeats", "1")["rows"]
    runs = {row["set"]: len(row["accuracy"]) for row in fewer}
    assert runs.pop("whole") == 1
    assert set(runs.values()) == {2}


def test_one_command_judges_many_networks(tiny: tuple[Path, Path]) -> None:
    folder, directory = copied(tiny, "networks")
    networks = '["convnet", "torchvision/mobilenet_v3_small"]'
    sets = ["distilled", "random", "whole"]
    options = ["--evaluate.networks", networks, "--evaluate.repeats", "1"]
    options += ["--evaluate.sets", json.dumps(sets)]
    made = stage(folder, directory, "evaluate", *options, "--evaluate.best_on_test_every", "1")
    found = json.loads((directory / "evaluation.json").read_text())
    assert [(row["network"], row["set"]) for row in found["rows"]] == [
        (network, name) for network in json.loads(networks) for name in sets
    ]
    for row in found["rows"]:
        assert row["best_on_test_mean"] >= row["mean"]
        assert row["ci95"] is None
        assert len(row["per_class"]) == len(row["confusion"]) == 10
        right = sum(row["confusion"][c][c] for c in range(10))
        assert right / sum(map(sum, row["confusion"])) == pytest.approx(row["mean"])
    assert [m["network"] for m in found["measures"]] == json.loads(networks)
    assert found["changes"]
    assert made["rows"] == found["rows"]


def test_a_network_that_does_not_fit_is_refused(tiny: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="VGG-11 needs images of at least 32 px"):
        stage(*copied(tiny, "misfit"), "evaluate", "--evaluate.networks", '["vgg11"]')


def test_no_core_waits_for_the_last_network() -> None:
    assert thread_shares(5, 2) == [2, 1, 1, 1, 1]
    assert thread_shares(5, 16) == [3] * 5
    assert thread_shares(6, 4, largest=1) == [1] * 6
    assert thread_shares(6, 3) == [1] * 6
    assert thread_shares(1, 8, largest=4) == [4]
    assert thread_shares(0, 4) == []


@pytest.mark.parametrize("interval", [0.0, 60.0])
def test_a_network_says_how_far_it_is_where_that_takes_long(
    tiny: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interval: float,
) -> None:
    folder, directory = tiny
    options = ["--config", str(folder / "tiny.toml"), "--storage_path", str(folder / "runs")]
    run = Run(parse_command(["evaluate", *options, "--name", directory.name]))
    task = evaluation_task(run, "distilled", 0, model=run.config.model)
    monkeypatch.setattr("pipeline.stages.networks.NETWORK_PROGRESS_S", interval)
    capsys.readouterr()
    task.run()
    told = re.findall(r"\[distilled, network 0\] ([\d.]+)/", capsys.readouterr().out)
    assert bool(told) == (interval == 0)
    assert [float(value) for value in told] == sorted(float(value) for value in told)


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_a_protocol_gives_the_same_on_one_and_four_workers(
    tiny: tuple[Path, Path], tmp_path: Path, protocol: str
) -> None:
    folder, directory = tiny[0], tiny[1]
    options = ["--config", str(folder / "tiny.toml"), "--storage_path", str(folder / "runs")]
    short = ["--evaluate.training.epochs", "2", "--evaluate.best_on_test_every"]
    short += ["1" if protocol == "paper" else "0", "--name", directory.name]
    run = Run(parse_command(["evaluate", *options, "--evaluate.protocol", protocol, *short]))
    sets = ["distilled", "random"]
    if run.config.curate.soft_labels:
        _, other = copied(tiny, f"soft-{tmp_path.name}")
        options = [*options, "--evaluate.protocol", protocol, *short[:-1], other.name]
        run = Run(parse_command(["evaluate", *options]))
        sets = ["distilled_soft", "random_soft"]
    tasks = [
        evaluation_task(run, name, repeat, model=run.config.model)  # type: ignore[arg-type]
        for name in sets
        for repeat in range(3)  # six networks on four workers: two of them have two threads
    ]
    rows = [
        rows_of(tasks, run_tasks(tasks, tmp_path / str(count), Workers(count, False), stage="x"))
        for count in (1, 4)
    ]
    assert rows[0] == rows[1]
    assert len({*rows[0][0]["accuracy"], *rows[0][1]["accuracy"]}) > 1
