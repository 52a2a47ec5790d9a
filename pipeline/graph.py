"""Stage graph of a run: dependencies, reuse by fingerprint, timing and logging.

    configuration and inputs -> identity -> directory -> manifest, written last

A stage requests the stages it depends on from the run, and they are built first. A stage whose
manifest has the required identity is reused. The manifest is removed before anything in its
directory changes: an interrupted stage has none and runs again in the same directory, where it may
reuse files it can identify as its own.

Stages are found by name: `search-proxy` is the class `SearchProxy` of
`pipeline.stages.search_proxy`. To add one, write its module.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, TypeVar

from upath import UPath

from ncfm.registry import lookup
from pipeline.data.sources import Source, open_source
from pipeline.errors import UsageError
from pipeline.observe.tracking import check_tracking
from pipeline.runtime.files import Manifest, read_json, write_atomic
from pipeline.runtime.identity import peak_rss_bytes
from pipeline.runtime.workers import WaitingNotice, Workers, connect, joins, size_workers

if TYPE_CHECKING:
    from pipeline.cli import Command
    from pipeline.config import RunConfig


class Action(ABC):
    """A command of the command line."""

    name: ClassVar[str]
    writes: ClassVar[bool] = True
    """Whether to create the run's directory first."""

    def __init__(self, run: "Run") -> None:
        self.run, self.config = run, run.config

    def check(self) -> None:  # noqa: B027 # most have nothing to check
        """Raise UsageError for errors that can be detected before anything starts."""

    @abstractmethod
    def perform(self) -> None:
        """Run the action and everything it depends on."""


class Stage(Action):
    """An action with a stored result, reused until something it depends on changes."""

    recorded: ClassVar[bool] = True
    """Whether its time and memory are recorded in the run's stages.json."""

    @property
    def label(self) -> str:
        """Name in the log."""
        return self.name

    @property
    def directory(self) -> UPath:
        """Directory of the manifest."""
        return self.run.directory / self.name

    @abstractmethod
    def identity(self) -> str:
        """Fingerprint of everything the result depends on, including the code's version."""

    @abstractmethod
    def build(self) -> Manifest:
        """Build the result; returns the entries of its manifest."""

    def summarise(self, manifest: Manifest) -> None:
        """Write and print summaries, also of a reused result."""

    def check(self) -> None:
        """See Action."""
        check_tracking(self.config.tracking)
        _ = self.run.source

    def perform(self) -> None:
        """See Action."""
        self.summarise(self.manifest)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest; the stage is built first if necessary."""
        return self.run.resolve(self)

    @property
    def fingerprint(self) -> str:
        """Identity of the stored result; the stage is built first if necessary."""
        identity: str = self.manifest["fingerprint"]
        return identity


S = TypeVar("S", bound=Action)


class Run:
    """One run: its configuration, its directory, and its stages."""

    def __init__(self, command: "Command") -> None:
        self.command = command
        self.config: RunConfig = command.config
        self.directory: UPath = self.config.run_directory
        self._actions: dict[type[Action], Action] = {}
        self._notice: WaitingNotice | None = None
        self._said: set[str] = set()

    @cached_property
    def source(self) -> Source:
        """The real images; opened on first use."""
        return open_source(self.config.source)

    def action(self, name: str) -> Action:
        """The stage or other action of that name."""
        return self.stage(action_class(name))

    def stage(self, kind: type[S]) -> S:
        """This run's instance of an action class."""
        if kind not in self._actions:
            self._actions[kind] = kind(self)
        action = self._actions[kind]
        assert isinstance(action, kind)
        return action

    def perform(self, names: tuple[str, ...]) -> None:
        """Check all named actions, then run them in order."""
        actions = [self.action(name) for name in names]
        for action in actions:
            action.check()
        if any(action.writes for action in actions):
            self.start()
        for action in actions:
            action.perform()

    def start(self) -> None:
        """Create the run's directory, and write the resolved configuration to it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / "config.toml", self.command.toml)
        except Exception as error:  # object store libraries raise errors of their own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"cannot write to storage_path {self.config.storage_path}: {reason}"
            ) from error

    def resolve(self, stage: Stage) -> Manifest:
        """A stage's manifest; the stage is built unless one with its identity exists."""
        try:
            manifest = run_stage(stage.label, stage.directory, stage.identity(), stage.build)
        finally:
            if self._notice is not None:
                self._notice.end()
        if stage.recorded:
            self._record(stage, manifest)
        return manifest

    def _record(self, stage: Stage, manifest: Manifest) -> None:
        path = self.directory / "stages.json"
        keys = ("seconds", "peak_rss_bytes", "reused", "fingerprint")
        entry = {**{key: manifest[key] for key in keys}, "directory": str(stage.directory)}
        write_atomic(path, json.dumps({**(read_json(path) or {}), stage.name: entry}, indent=1))

    # ------------------------------------------------------------------ the cluster

    def workers(self, items: int, *, threads: int = 1) -> Workers:
        """Join the cluster, and size a worker group for `items` items that can use `threads`
        threads each.
        """
        cfg = self.config
        connect()
        workers = size_workers(cfg.num_workers, cfg.use_gpu, items, threads=threads, grows=joins())
        if joins() and cfg.use_gpu is None and not workers.use_gpu:
            self._say_once(
                "[cluster] no GPU in the cluster: workers use CPUs; if GPUs come on demand, "
                "request them with --use_gpu true --num_workers N"
            )
        self.wait_for(workers.needs)
        return workers

    def wait_for(self, needs: Mapping[str, float]) -> None:
        """Log the resources that are waited for, until the stage ends."""
        if self._notice is not None:
            self._notice.end()
        self._notice = WaitingNotice(needs, lambda text: log(f"[cluster] {text}"))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log(text)


def action_class(name: str) -> type[Action]:
    """The class of the stage or other action of that name; a dotted name is the path of a user's
    class. Raises UsageError if there is none.
    """
    if "." in name:
        try:
            own: type[Action] = lookup("the stage", name, {})
        except ValueError as error:
            raise UsageError(str(error)) from error
        return own
    module = import_module(f"pipeline.stages.{name.replace('-', '_')}")
    built_in: type[Action] = getattr(module, name.title().replace("-", ""))
    return built_in


def run_stage(
    name: str, directory: UPath, identity: str, build: Callable[[], Manifest]
) -> Manifest:
    """Run `build` in `directory`, unless the manifest there has this fingerprint; returns the
    manifest.

    `identity` is the fingerprint of everything the result depends on.
    """
    path = directory / "manifest.json"
    existing = read_json(path)
    if existing is not None and existing.get("fingerprint") == identity:
        log(f"[{name}] reusing {directory}")
        return {**existing, "reused": True}
    directory.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # before `build` changes what it describes
    log(f"[{name}] {directory}")
    started = time.monotonic()
    built = build()
    manifest = {
        **built,
        "stage": name,
        "fingerprint": identity,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": max(peak_rss_bytes(), built.get("peak_rss_bytes", 0)),
        "reused": False,
    }
    write_atomic(path, json.dumps(manifest, indent=1))
    log(f"[{name}] done in {manifest['seconds']:.1f} s")
    return manifest


def log(text: str) -> None:
    """Print a line, unbuffered."""
    print(text, flush=True)  # noqa: T201
