"""Identities cover the version of the code's results: a stage runs again when its own is raised, or
that of a stage before it, and at no other time.
"""

import functools
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from upath import UPath

import pipeline.graph
import pipeline.stages.tuning.trial
from pipeline.cli import Command, parse_command
from pipeline.graph import Run
from pipeline.stages.tuning.trial import SweepJob, input_key

PRESET = """
[curate]
soft_labels = true
[tune.space."distill.lr"]
loguniform = [1e-3, 1e-1]
"""
STAGES = (
    "shard", "pretrain", "distill", "curate", "evaluate", "audit", "continual", "search-proxy",
    "tune",
)  # fmt: skip
# What a distilled set is counts by its bytes: what follows from it changes when they do.
DEPENDENTS = {
    "shard": STAGES,
    "pretrain": ("pretrain", "distill", "curate", "evaluate", "audit", "continual", "tune"),
    "distill": ("distill", "curate", "tune"),
    "curate": ("curate", "evaluate"),
    "evaluate": ("evaluate", "continual", "search-proxy", "tune"),
    "audit": ("audit",),
    "continual": ("continual",),
    "search-proxy": ("search-proxy",),
    "tune": ("tune",),
}


class RecordedError(Exception):
    """Raised in the place of a stage's work, with its identity."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run's command, and as much of its directory as identities read."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "some.toml").write_text(PRESET)
    options = ["--config", str(folder / "some.toml"), "--storage_path", str(folder / "runs")]
    command = parse_command(["tune", *options])
    for name in ("distilled", "curated"):
        directory = command.config.run_directory / name
        directory.mkdir(parents=True)
        (directory / "manifest.json").write_text(json.dumps({"sha256": {"file": name}}))
    return command


@pytest.fixture(autouse=True)
def opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source, and configurations that a search makes of its own: each takes a second."""
    monkeypatch.setattr(pipeline.graph, "open_source", lambda config: SOURCES(config))
    monkeypatch.setattr(
        Command, "changed", lambda self, values: COMMANDS(self.toml, json.dumps(values))
    )


SOURCES = functools.cache(pipeline.graph.open_source)
CHANGED = Command.changed


@functools.cache
def COMMANDS(toml: str, values: str) -> Command:  # noqa: N802
    config: Any = None
    return CHANGED(Command((), config, toml), json.loads(values))


def identities(command: Command, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The identity of every stage; those before it count as done, nothing is computed."""
    wanted = ""

    def fake(name: str, _: Any, identity: str, *__: Any, **___: Any) -> dict[str, Any]:
        if name == wanted:
            raise RecordedError(identity)
        counts = {"counts": [8] * 10, "shards": []}
        return {
            **{"fingerprint": identity, "seconds": 0, "peak_rss_bytes": 0, "reused": True},
            **{"splits": {"train": counts}, "class_names": ["c"] * 10},
            **{"channels": 3, "image_size": 32},
        }

    monkeypatch.setattr(pipeline.graph, "run_stage", fake)
    run, found = Run(command), {}
    for wanted in STAGES:
        with pytest.raises(RecordedError) as recorded:
            run.action(wanted).perform()
        found[wanted] = str(recorded.value)
    return found


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Raises the version of a stage, in every module that has it."""

    def raise_version(stage: str) -> None:
        constant = f"{stage.upper().replace('-', '_')}_VERSION"
        modules = [m for n, m in sys.modules.items() if n.startswith("pipeline.stages")]
        modules = [module for module in modules if hasattr(module, constant)]
        assert modules
        for module in modules:
            monkeypatch.setattr(module, constant, getattr(module, constant) + 1)

    return raise_version


@pytest.mark.parametrize("stage", STAGES)
def test_a_raised_version_changes_the_identities_that_depend_on_it(
    stage: str, command: Command, monkeypatch: pytest.MonkeyPatch, raised: Any
) -> None:
    before = identities(command, monkeypatch)
    raised(stage)
    after = identities(command, monkeypatch)
    assert {name for name in STAGES if after[name] != before[name]} == set(DEPENDENTS[stage])


def test_a_trial_depends_on_search_and_evaluation(
    command: Command, monkeypatch: pytest.MonkeyPatch, raised: Any
) -> None:
    """A search goes on from its trials' directories, whatever the stage's manifest says."""
    store = SimpleNamespace(counts=lambda split: [5, 5])
    base: Any = SimpleNamespace(checkpoints=UPath("identity"), tracked=None, store=store)
    monkeypatch.setattr(pipeline.stages.tuning.trial, "replace", lambda value, **_: value)

    def directory() -> str:
        inputs = {input_key({}): base}
        sweep = SweepJob(name="", config=command.config, directory=UPath(), inputs=inputs)
        return sweep.trial(0, {}).directory.name

    names = [directory(), directory()]
    assert names[0] == names[1]  # negative control
    for stage in ("tune", "evaluate"):
        raised(stage)
        names.append(directory())
    assert len(set(names)) == 3
