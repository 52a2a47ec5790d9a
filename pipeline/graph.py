"""What a run does, in which order: stages by name, their reuse, timing and logging.

    configuration and inputs -> identity -> directory -> manifest, written last

A stage asks the run for the stages that it needs, and they are made first. One whose manifest
carries the wanted identity is reused. The manifest is removed before anything in its directory
changes: a stage that was cut off has none and is run again over what it left, of which it may use
what it knows to be its own.

The stage `search-proxy` is the class `SearchProxy` of `pipeline.stages.search_proxy`, and so on: to
add one is to write its module.
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
    """What a user can name on the command line."""

    name: ClassVar[str]
    writes: ClassVar[bool] = True
    """Whether the run's directory is made before."""

    def __init__(self, run: "Run") -> None:
        self.run, self.config = run, run.config

    def check(self) -> None:  # noqa: B027 # most have nothing to check
        """Raise UsageError for what can be known to fail before anything starts."""

    @abstractmethod
    def perform(self) -> None:
        """Do it, with all that it needs."""


class Stage(Action):
    """An action whose result is kept, and reused where nothing that it depends on has changed."""

    recorded: ClassVar[bool] = True
    """Whether its time and memory go into the run's stages.json."""

    @property
    def label(self) -> str:
        """What it is called in the log."""
        return self.name

    @property
    def directory(self) -> UPath:
        """Where its manifest is."""
        return self.run.directory / self.name

    @abstractmethod
    def identity(self) -> str:
        """Fingerprint of all that the result depends on, the version of the code included."""

    @abstractmethod
    def build(self) -> Manifest:
        """Make it; returns what its manifest says of it."""

    def summarise(self, manifest: Manifest) -> None:
        """Write and print what people look at; of a reused result, too."""

    def check(self) -> None:
        """See Action."""
        check_tracking(self.config.tracking)
        _ = self.run.source

    def perform(self) -> None:
        """See Action."""
        self.summarise(self.manifest)

    @cached_property
    def manifest(self) -> Manifest:
        """Its manifest; it is made first if it is not there."""
        return self.run.resolve(self)

    @property
    def fingerprint(self) -> str:
        """The identity of the result that is there by now."""
        found: str = self.manifest["fingerprint"]
        return found


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
        """The real images; what needs none never opens it."""
        return open_source(self.config.source)

    def action(self, name: str) -> Action:
        """The stage, or what else has that name on the command line."""
        return self.stage(action_class(name))

    def stage(self, kind: type[S]) -> S:
        """This run's stage of that kind."""
        if kind not in self._actions:
            self._actions[kind] = kind(self)
        found = self._actions[kind]
        assert isinstance(found, kind)
        return found

    def perform(self, names: tuple[str, ...]) -> None:
        """Check all of these, then do them one after the other."""
        actions = [self.action(name) for name in names]
        for action in actions:
            action.check()
        if any(action.writes for action in actions):
            self.start()
        for action in actions:
            action.perform()

    def start(self) -> None:
        """Make the run's directory, and write down the resolved configuration."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / "config.toml", self.command.toml)
        except Exception as error:  # of whatever kind the library of an object store has for it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"cannot write to storage_path {self.config.storage_path}: {reason}"
            ) from error

    def resolve(self, stage: Stage) -> Manifest:
        """A stage's manifest; unless that of its very identity is there, the stage is built."""
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
        """Join the cluster, and size a group of workers for so many items, each of which so many
        threads can share.
        """
        cfg = self.config
        connect()
        workers = size_workers(cfg.num_workers, cfg.use_gpu, items, threads=threads, grows=joins())
        if joins() and cfg.use_gpu is None and not workers.use_gpu:
            self._say_once(
                "[cluster] no GPU in the cluster: workers use CPUs; where GPUs come on demand, "
                "ask for them with --use_gpu true --num_workers N"
            )
        self.wait_for(workers.needs)
        return workers

    def wait_for(self, needs: Mapping[str, float]) -> None:
        """Say what is waited for, until the stage ends."""
        if self._notice is not None:
            self._notice.end()
        self._notice = WaitingNotice(needs, lambda text: log(f"[cluster] {text}"))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log(text)


def action_class(name: str) -> type[Action]:
    """The class of the stage, or what else has that name on the command line; a name with a dot in
    it is that of a class of the user's own. Raises UsageError if there is none.
    """
    if "." in name:
        try:
            own: type[Action] = lookup("the stage", name, {})
        except ValueError as error:
            raise UsageError(str(error)) from error
        return own
    module = import_module(f"pipeline.stages.{name.replace('-', '_')}")
    found: type[Action] = getattr(module, name.title().replace("-", ""))
    return found


def run_stage(
    name: str, directory: UPath, identity: str, build: Callable[[], Manifest]
) -> Manifest:
    """Run `build` in `directory`, unless the manifest there says that this very thing exists;
    returns the manifest.

    `identity` is the fingerprint of everything the result depends on.
    """
    path = directory / "manifest.json"
    found = read_json(path)
    if found is not None and found.get("fingerprint") == identity:
        log(f"[{name}] reusing {directory}")
        return {**found, "reused": True}
    directory.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # before `build` changes what it vouches for
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
    """Print a line at once."""
    print(text, flush=True)  # noqa: T201
