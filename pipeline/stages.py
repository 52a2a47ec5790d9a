"""The stages in order: what each depends on, where it writes, when it has to run again."""

import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from upath import UPath

from ncfm import load
from ncfm.models import ModelConfig, build_model
from ncfm.seeding import keyed_seed
from pipeline.assignment import most_workers
from pipeline.audit import AUDIT_VERSION, AuditJob, audit, audit_table
from pipeline.config import Command, RunConfig, UsageError, changed_command
from pipeline.continual import CONTINUAL_VERSION, continual_rows, continual_table, moments
from pipeline.curate import CURATE_VERSION, CurateJob, curate
from pipeline.data.store import Store
from pipeline.distill import DISTILL_VERSION, DistillJob, distill
from pipeline.evaluate import (
    EVALUATE_VERSION,
    EvaluationTask,
    SetName,
    evaluate,
    run_tasks,
    table,
)
from pipeline.pretrain import PRETRAIN_VERSION, PretrainJob, pretrain
from pipeline.progress import append_rows, read_rows
from pipeline.protocols import changes
from pipeline.search_proxy import SEARCH_PROXY_VERSION, proxy_content, proxy_table
from pipeline.shard import shard, shard_identity
from pipeline.sources import Source, open_source
from pipeline.stage import (
    Manifest,
    canonical_json,
    code_versions,
    fingerprint,
    read_json,
    run_stage,
    write_atomic,
)
from pipeline.tracking import TrackedRun, check_tracking, dotted
from pipeline.tuning import TUNE_VERSION
from pipeline.tuning.search import build_sampler, check_search, input_values
from pipeline.tuning.trial import SweepJob, input_key
from pipeline.workers import (
    WaitingNotice,
    Workers,
    connect,
    joins,
    set_ray_environment,
    size_workers,
)


class Run:
    """One run: its configuration, its directory, and its stages. A stage runs those before it if
    they are missing.
    """

    def __init__(self, command: Command) -> None:
        check_tracking(command.config.tracking)
        if "tune" in command.stages:
            check_search(command)
        self.command = command
        self.config: RunConfig = command.config
        self.directory: UPath = self.config.run_directory
        self.toml = command.toml
        self.source: Source = open_source(self.config.source)
        self._notice: WaitingNotice | None = None
        self._said: set[str] = set()

    def stages(self) -> dict[str, Callable[[], Manifest]]:
        """The stages by name, in order; the last ones run only when they are named."""
        return {
            "shard": lambda: self.shards,
            "pretrain": lambda: self.pool,
            "distill": lambda: self.distilled,
            "evaluate": self.evaluate,
            "report": self.report,
            "tune": self.tune,
            "plan": self.plan,
            "audit": self.audit,
            "continual": self.continual,
            "search-proxy": self.search_proxy,
            "export": self.export,
        }

    def start(self) -> None:
        """Make the run's directory, and write down the resolved configuration."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self.directory / "config.toml", self.toml)
        except Exception as error:  # of whatever kind the library of an object store has for it
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"cannot write to storage_path {self.config.storage_path}: {reason}"
            ) from error

    def _workers(self, items: int) -> Workers:
        cfg = self.config
        connect()
        workers = size_workers(cfg.num_workers, cfg.use_gpu, items, grows=joins())
        if joins() and cfg.use_gpu is None and not workers.use_gpu:
            self._say_once(
                "[cluster] no GPU in the cluster: workers use CPUs; where GPUs come on demand, "
                "ask for them with --use_gpu true --num_workers N"
            )
        self._wait_for(workers.needs)
        return workers

    def _wait_for(self, needs: Mapping[str, float]) -> None:
        """Say what is waited for, until the stage ends."""
        if self._notice is not None:
            self._notice.end()
        self._notice = WaitingNotice(needs, lambda text: _log(f"[cluster] {text}"))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log(text)

    def _stage(
        self, name: str, directory: UPath, identity: str, build: Callable[[], Manifest]
    ) -> Manifest:
        """Run a stage and write its time and memory into the run's stages.json."""
        try:
            manifest = run_stage(name, directory, identity, build, log=_log)
        finally:
            if self._notice is not None:
                self._notice.end()
        path = self.directory / "stages.json"
        entry = {
            key: manifest[key] for key in ("seconds", "peak_rss_bytes", "reused", "fingerprint")
        }
        write_atomic(
            path,
            json.dumps(
                {**(read_json(path) or {}), name: {**entry, "directory": str(directory)}}, indent=1
            ),
        )
        return manifest

    # ------------------------------------------------------------------ shard

    @cached_property
    def shard_directory(self) -> UPath:
        """The shards' place in the cache; it follows from the source's content and the shard
        options.
        """
        return self.config.cache("shard", shard_identity(self.source, self.config.shard))

    @cached_property
    def shards(self) -> Manifest:
        """Per-class WebDataset shards."""

        def build() -> Manifest:
            connect()
            self._wait_for({"CPU": 1.0})
            return shard(self.source, self.config.shard, self.shard_directory)

        found = self._stage("shard", self.shard_directory, self.shard_directory.name, build)
        return {**found, "class_names": list(self.source.class_names)}  # as they are called by now

    @property
    def store(self) -> Store:
        """The images of the shards on whatever node asks for them."""
        return Store(self.shard_directory, self.shards, self.config.runtime.local_directory)

    # ------------------------------------------------------------------ pretrain

    @cached_property
    def pool_directory(self) -> UPath:
        """The pool's place in the cache."""
        cfg = self.config
        return self._pool_directory(cfg.model, cfg.seed, cfg.pretrain.snapshot_every)

    def _pool_directory(self, model: ModelConfig, seed: int, snapshot_every: int) -> UPath:
        identity = fingerprint(
            "pretrain",
            PRETRAIN_VERSION,
            self.shards["fingerprint"],
            model,
            self.config.pretrain.training,
            snapshot_every,
            seed,
        )
        return self.config.cache("pretrain", identity)

    @cached_property
    def pool(self) -> Manifest:
        """The pool of extractors. A larger pool adds to a smaller one."""
        cfg = self.config
        job = PretrainJob(
            store=self.store,
            directory=self.pool_directory,
            model=cfg.model,
            config=cfg.pretrain,
            seed=cfg.seed,
            checkpoint_every_s=cfg.runtime.checkpoint_every_s,
        )

        def build() -> Manifest:
            workers = self._workers(cfg.pretrain.networks)
            return pretrain(
                job,
                workers,
                storage=cfg.storage / "cache" / "ray",
                max_failures=cfg.runtime.max_failures,
            )

        identity = fingerprint(self.pool_directory.name, cfg.pretrain.networks)
        return self._stage("pretrain", self.pool_directory, identity, build)

    # ------------------------------------------------------------------ distill

    def distill_job(self) -> DistillJob:
        """What the distillation's workers are given."""
        cfg = self.config
        matters = (cfg.synthetic, cfg.distill, cfg.frequencies, cfg.augment, cfg.ipc, cfg.seed)
        identity = fingerprint(
            "distill",
            DISTILL_VERSION,
            self.shards["fingerprint"],
            self.pool["fingerprint"],
            *matters,
        )
        return DistillJob(
            store=self.store,
            pool=self.pool_directory,
            networks=cfg.pretrain.networks,
            snapshot_epochs=cfg.pretrain.snapshot_epochs,
            checkpoints=self.directory / "checkpoints" / identity,
            metrics=self.directory / "metrics.jsonl",
            model=cfg.model,
            synthetic=cfg.synthetic,
            distill=cfg.distill,
            frequencies=cfg.frequencies,
            augment=cfg.augment,
            runtime=cfg.runtime,
            ipc=cfg.ipc,
            seed=cfg.seed,
            tracked=TrackedRun(
                config=cfg.tracking,
                name=self.directory.name,
                identity=identity,
                tensorboard=self.directory / "tensorboard" / "distill",
                directory=self.directory,
                options=dotted(dataclasses.asdict(cfg)),
            ),
        )

    @cached_property
    def distilled(self) -> Manifest:
        """The synthetic set, in the run's own directory."""
        cfg, job = self.config, self.distill_job()
        provenance = {
            "command": shlex.join(["python", "pipeline/run.py", *sys.argv[1:]]),
            "config": json.loads(json.dumps(dataclasses.asdict(cfg))),
            "seed": cfg.seed,
            "method": cfg.method,
            "method_changes": cfg.method_changes(),
            "versions": code_versions(),
            "inputs": {"shards": self.shards["fingerprint"], "pool": self.pool["fingerprint"]},
        }

        def build() -> Manifest:
            # Unless told otherwise, workers share a class only if each gets enough of it.
            workers = self._workers(max(cfg.num_workers or 1, most_workers(job.costs())))
            mine = [row for row in read_rows(job.metrics) if row["stage"] == "distill"]
            pool_rows = [
                row
                for path in sorted(self.pool_directory.glob("metrics-*.jsonl"))
                for row in read_rows(path)
            ]
            append_rows(job.metrics, [*pool_rows, *mine], fresh=True)
            return distill(
                job,
                workers,
                storage=cfg.storage / "cache" / "ray",
                run_directory=self.directory,
                provenance=provenance,
            )

        return self._stage("distill", self.directory / "distill", job.checkpoints.name, build)

    @cached_property
    def curated(self) -> Manifest:
        """The distilled set with soft labels, in the run's directory; the other stays as it is."""
        cfg = self.config
        job = CurateJob(
            distilled=self.directory / "distilled",
            curated=self.directory / "curated",
            pool=self.pool_directory,
            networks=cfg.pretrain.networks,
            model=cfg.model,
            config=cfg.curate,
        )
        identity = fingerprint("curate", CURATE_VERSION, self.distilled["fingerprint"], cfg.curate)
        return self._stage(
            "curate", self.directory / "curation", identity, lambda: curate(job, self._workers(1))
        )

    # ------------------------------------------------------------------ evaluate

    def evaluate(self) -> Manifest:
        """Accuracies of the distilled set and of its baselines, for every network."""
        cfg = self.config
        soft: dict[str, tuple[SetName, SetName]] = {
            "distilled": ("distilled_soft", "distilled_soft_views"),
            "random": ("random_soft", "random_soft_views"),
        }
        wanted = cfg.curate.soft_labels, cfg.curate.per_view
        sets: list[SetName] = []
        for name in cfg.evaluate.sets:
            sets += [name, *itertools.compress(soft.get(name, ()), wanted)]
        models = [self._model(name) for name in cfg.evaluate.networks] or [cfg.model]
        for model in models:
            self._check_model(model)
        tasks = [
            self._task(name, repeat, model=model)
            for model in models
            for name in sets
            for repeat in range(cfg.evaluate.repeats)
        ]

        def build() -> Manifest:
            return evaluate(tasks, self._results, self._workers(len(tasks)))

        identity = fingerprint("evaluate", *(task.result_path(cfg.storage).name for task in tasks))
        manifest = self._stage("evaluate", self.directory / "evaluation", identity, build)
        content = {
            "protocol": cfg.evaluate.protocol,
            "changes": changes(cfg.evaluate, cfg.curate),
            "rows": manifest["rows"],
            "measures": manifest["measures"],
        }
        write_atomic(self.directory / "evaluation.json", json.dumps(content, indent=1))
        _log(table(manifest["rows"]))
        return manifest

    @property
    def _results(self) -> UPath:
        """Results of single networks, shared by all runs of a storage path."""
        return self.config.storage / "cache" / "evaluate"

    def _model(self, name: str) -> ModelConfig:
        """The network of that name; the run's own options hold for its own."""
        return self.config.model if name == self.config.model.name else ModelConfig(name=name)

    def _check_model(self, model: ModelConfig) -> None:
        """Raises UsageError if a network cannot be built for these images."""
        manifest = self.shards
        try:
            with torch.device("meta"):
                build_model(
                    model,
                    num_classes=len(manifest["class_names"]),
                    channels=manifest["channels"],
                    image_size=manifest["image_size"],
                )
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _task(
        self,
        name: SetName,
        repeat: int,
        *,
        model: ModelConfig,
        classes: tuple[int, ...] | None = None,
    ) -> EvaluationTask:
        cfg = self.config
        counts = self.shards["splits"]["train"]["counts"]
        training = cfg.evaluate.training

        def teachers() -> tuple[object, ...]:
            return self.pool["fingerprint"], cfg.curate, CURATE_VERSION

        content: dict[SetName, Callable[[], object]] = {
            "distilled": lambda: self._set_hash("distilled"),
            "distilled_soft": lambda: self._set_hash("curated"),
            "distilled_soft_views": lambda: (self._set_hash("distilled"), *teachers()),
            "random": lambda: cfg.ipc,
            "random_soft": lambda: (cfg.ipc, *teachers()),
            "random_soft_views": lambda: (cfg.ipc, *teachers()),
            "random_same_factor": lambda: (cfg.ipc, cfg.synthetic.factor),
            "herding": lambda: (cfg.ipc, self.pool["fingerprint"]),
            "whole": lambda: "",
        }
        if name == "whole":
            training = dataclasses.replace(cfg.pretrain.training, epochs=cfg.evaluate.whole_epochs)
        return EvaluationTask(
            set=name,
            repeat=repeat,
            identity=fingerprint(self.shards["fingerprint"], content[name]()),
            store=self.store,
            distilled=self.directory / ("curated" if name == "distilled_soft" else "distilled"),
            pool=self.pool_directory,
            pool_model=cfg.model,
            networks=cfg.pretrain.networks,
            curate=cfg.curate,
            model=model,
            training=training,
            hard_epochs=round(cfg.curate.hard_fraction * training.epochs),
            legacy_every=cfg.evaluate.legacy_every if classes is None else 0,
            classes=classes,
            ipc=round(sum(counts) / len(counts)) if name == "whole" else cfg.ipc,
            factor=cfg.synthetic.factor,
            seed=cfg.seed,
        )

    def _set_hash(self, name: Literal["distilled", "curated"]) -> str:
        _ = getattr(self, name)  # runs the stage if it has to
        return canonical_json(read_json(self.directory / name / "manifest.json")["sha256"])

    # ------------------------------------------------------------------ audit

    def audit(self) -> Manifest:
        """How faithful the distilled set is to the whole real set, into audit.json."""
        cfg = self.config
        models = [self._model(name) for name in cfg.audit.networks] or [cfg.model]
        job = AuditJob(
            store=self.store,
            distilled=self.directory / "distilled",
            extractors=tuple((model, self._unseen_extractor(model)) for model in models),
            config=cfg.audit,
            ipc=cfg.ipc,
            factor=cfg.synthetic.factor,
            seed=cfg.seed,
        )
        shards = self.shards["splits"]["train"]["shards"]
        identity = fingerprint(
            "audit",
            AUDIT_VERSION,
            self._set_hash("distilled"),
            [pool.name for _, pool in job.extractors],
            cfg.audit,
            [cfg.ipc, cfg.synthetic.factor, cfg.seed],
        )
        directory = self.directory / "audit"
        manifest = self._stage(
            "audit",
            directory,
            identity,
            lambda: audit(job, self._workers(len(shards)), directory=directory),
        )
        write_atomic(self.directory / "audit.json", json.dumps(manifest, indent=1))
        _log(audit_table(manifest))
        return manifest

    def _unseen_extractor(self, model: ModelConfig) -> UPath:
        """A pool of one network that the distillation has not seen, in the cache."""
        cfg = self.config
        self._check_model(model)
        seed = keyed_seed(cfg.seed, "audit_extractor")
        directory = self._pool_directory(model, seed, snapshot_every=0)
        job = PretrainJob(
            store=self.store,
            directory=directory,
            model=model,
            config=dataclasses.replace(cfg.pretrain, networks=1, snapshot_every=0),
            seed=seed,
            checkpoint_every_s=cfg.runtime.checkpoint_every_s,
        )

        def build() -> Manifest:
            return pretrain(
                job,
                self._workers(1),
                storage=cfg.storage / "cache" / "ray",
                max_failures=cfg.runtime.max_failures,
            )

        run_stage(
            f"extractor {model.name}", directory, fingerprint(directory.name, 1), build, log=_log
        )
        return directory

    # ------------------------------------------------------------------ uses of the set

    def continual(self) -> Manifest:
        """Class-incremental learning with each set as the memory, into continual.json."""
        cfg = self.config
        try:
            found = moments(len(self.shards["class_names"]), cfg.continual, cfg.seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        sets: list[SetName] = ["distilled", "random", "random_same_factor", "herding"]
        keys = [(name, moment) for name in sets for moment in found]
        tasks = [
            self._task(name, moment.repeat, model=cfg.model, classes=moment.classes)
            for name, moment in keys
        ]

        def build() -> Manifest:
            workers = self._workers(len(tasks))
            results = run_tasks(tasks, self._results, workers, stage="continual")
            accuracies = [result["accuracy"] for result in results]
            return {
                "rows": continual_rows(keys, accuracies),
                "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
            }

        return self._use(
            "continual",
            CONTINUAL_VERSION,
            tasks,
            build,
            lambda found: continual_table(found["rows"]),
        )

    def search_proxy(self) -> Manifest:
        """Whether each set ranks architectures as the whole set does, into search-proxy.json."""
        cfg = self.config
        try:
            models = cfg.search_proxy.grid()
        except ValueError as error:
            raise UsageError(str(error)) from error
        for model in models:
            self._check_model(model)
        sets: list[SetName] = ["distilled", "random", "random_same_factor", "whole"]
        repeats = cfg.search_proxy.repeats
        tasks = [
            self._task(name, repeat, model=model)
            for name in sets
            for model in models
            for repeat in range(repeats)
        ]

        def build() -> Manifest:
            workers = self._workers(len(tasks))
            results = run_tasks(tasks, self._results, workers, stage="search-proxy")
            values = iter(result["accuracy"] for result in results)
            found: dict[str, list[list[float]]] = {
                name: [[next(values) for _ in range(repeats)] for _ in models] for name in sets
            }
            return {
                **proxy_content(models, found),
                "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
            }

        return self._use("search-proxy", SEARCH_PROXY_VERSION, tasks, build, proxy_table)

    def _use(
        self,
        name: str,
        version: int,
        tasks: Sequence[EvaluationTask],
        build: Callable[[], Manifest],
        text: Callable[[Any], str],
    ) -> Manifest:
        """A stage of networks whose summary is <name>.json of the run's directory."""
        identity = fingerprint(
            name, version, *(task.result_path(self.config.storage).name for task in tasks)
        )
        manifest = self._stage(name, self.directory / name, identity, build)
        write_atomic(
            self.directory / f"{name}.json",
            json.dumps({k: manifest[k] for k in manifest if k in _USES}, indent=1),
        )
        _log(text(manifest))
        return manifest

    def export(self) -> Manifest:
        """The distilled set in a format that others read, under export/ of the run's directory.

        The set with soft labels if there is one.
        """
        from pipeline.export import export  # pyarrow takes its time

        _ = self.curated if self.config.curate.soft_labels else self.distilled
        name = "curated" if self.config.curate.soft_labels else "distilled"
        evaluation = read_json(self.directory / "evaluation.json") or {}
        directory = export(
            load(self.directory / name),
            self.directory / "export" / self.config.export.to,
            self.config.export.to,
            name=self.directory.name,
            rows=evaluation.get("rows", []),
        )
        _log(f"export: {directory}")
        return {}

    # ------------------------------------------------------------------ tune

    def tune(self) -> Manifest:
        """Search over options; the best configurations are presets in <run>/tune/."""
        set_ray_environment()
        from pipeline.tuning.tune import summary, trial_resources, tune, write_results

        cfg = self.config
        directory = self.directory / "tune"
        sampler = build_sampler(cfg, directory)
        held_out = cfg.source.selection_fraction or cfg.tune.selection_fraction
        inputs = {}
        for values in input_values(cfg.tune, sampler):
            shared = {**values, "source.selection_fraction": held_out}
            inputs[input_key(values)] = Run(changed_command(self.toml, shared)).distill_job()
        sweep = SweepJob(name=self.directory.name, config=cfg, directory=directory, inputs=inputs)

        def build() -> Manifest:
            use_gpu = self._workers(1).use_gpu
            resources = trial_resources(cfg.tune, use_gpu=use_gpu)
            return tune(sweep, sampler, resources, storage=cfg.storage / "cache" / "ray")

        jobs = {key: job.checkpoints.name for key, job in inputs.items()}
        versions = [TUNE_VERSION, EVALUATE_VERSION]
        identity = fingerprint("tune", versions, cfg.tune, cfg.evaluate.training, jobs)
        manifest = self._stage("tune", directory, identity, build)
        write_results(directory, manifest, cfg.tune, self.command)
        _log(summary(manifest))
        _log(f"[tune] best: python pipeline/run.py --config {directory / 'best.toml'}")
        self.report()
        return manifest

    # ------------------------------------------------------------------ plan

    def plan(self) -> Manifest:
        """Tell what the run would need; nothing is started or written."""
        from pipeline.plan import make_plan, told

        _log(told(make_plan(self.config, self.source, self.toml), self.config))
        return {}

    # ------------------------------------------------------------------ report

    def report(self) -> Manifest:
        """report.html of whatever the run's directory holds."""
        from pipeline.reporting.report import write_report  # plotly takes its time

        made = ("distilled/manifest.json", "tune/results.json")
        if not any((self.directory / name).exists() for name in made):
            raise UsageError(f"nothing to report in {self.directory} yet: run distill first")
        path = write_report(self.directory)
        _log(f"report: {path}")
        return {}


_USES = ("rows", "networks", "sets")  # what continual.json and search-proxy.json hold


def _log(text: str) -> None:
    print(text, flush=True)  # noqa: T201
