"""The configuration of a run: the stages' own dataclasses, composed, and the command line made from
them.
"""

import dataclasses
import functools
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from upath import UPath

from ncfm.augment import AugmentConfig
from ncfm.curation import CurateConfig
from ncfm.distill import DistillConfig
from ncfm.frequencies import FrequencyConfig
from ncfm.models import ModelConfig
from ncfm.synthetic import SyntheticConfig
from ncfm.train import TrainConfig
from pipeline.audit_config import AuditConfig
from pipeline.continual import ContinualConfig
from pipeline.data.shards import ShardConfig
from pipeline.export_config import ExportConfig
from pipeline.methods import MethodName, method_changes, method_settings
from pipeline.protocols import EvaluateConfig, flat, settings
from pipeline.search_proxy import SearchProxyConfig
from pipeline.sources import SourceConfig
from pipeline.tuning.search_space import TuneConfig

PRESETS = Path(__file__).parent / "presets"
STAGES = ("shard", "pretrain", "distill", "evaluate", "report")
EXTRA_STAGES = ("tune", "plan", "audit", "continual", "search-proxy", "export", "clean")  # if named


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The pool of feature extractors."""

    networks: int = 20
    """Networks in the pool (released code: 20)."""
    training: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            augment=AugmentConfig(strategy="color_crop", single=False), cutmix_prob=0.5
        )
    )
    """Training of one of them; the defaults are the released code's."""
    snapshot_every: int = 0
    """Keep a snapshot of every network each so many epochs, the initial and the trained one
    included, for distill.extractor `snapshot` and `snapshot_blend`. 0: these two alone."""

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise ValueError(f"networks must be at least 1, got {self.networks}")
        if self.snapshot_every < 0:
            raise ValueError(f"snapshot_every must not be negative, got {self.snapshot_every}")

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """Epochs of training after which the weights are kept, from 0 to the last."""
        last = self.training.epochs
        return (*range(0, last, self.snapshot_every or last), last)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How long stages run on a cluster."""

    log_every: int = 10
    """Distillation steps between two rows of metrics."""
    checkpoint_every_s: float = 30.0
    """Seconds between two checkpoints."""
    checkpoints_kept: int = 2
    max_failures: int = 3
    """How often a group of workers is started again after one of them failed; -1 without limit."""
    min_workers: int | None = None
    """If nodes are lost, go on with as few workers as this; default: wait until they are back."""
    collective_timeout_s: float = 600.0
    """How long workers wait for each other before they fail and name the one that did not come."""
    straggler_factor: float = 2.0
    """A worker this many times slower than the others is named in the log."""
    local_directory: str | None = None
    """Where a node keeps the decoded real images; $NAMES in it are the node's environment
    variables. Default: beside the shards, or below $TMPDIR if they are not on the node's own disk.
    """

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.min_workers is not None and self.min_workers < 1:
            raise ValueError(f"min_workers must be at least 1, got {self.min_workers}")
        if not self.collective_timeout_s > 0:
            raise ValueError(
                f"collective_timeout_s must be positive, got {self.collective_timeout_s}"
            )
        if not self.straggler_factor > 1:
            raise ValueError(f"straggler_factor must exceed 1, got {self.straggler_factor}")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where rows of metrics are sent, beside the run's own metrics.jsonl."""

    tensorboard: bool = True
    """Whether to write <run>/tensorboard/ (not in an object store)."""
    mlflow: str | None = None
    """URI of an MLflow tracking server (http://...), or, where sqlalchemy is installed, of a
    database (sqlite:///...); needs the extra `mlflow`."""
    wandb: str | None = None
    """Project of Weights & Biases; needs the extra `wandb`."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Stage plan: what a run would need."""

    gpu: str | None = None
    """Predict for this GPU from a table instead of by a probe of this machine."""
    probe_s: float = 60.0
    """About how long the probe of the step may take."""
    max_steps: int = 5
    """Steps that are timed, after one that is not counted."""

    def __post_init__(self) -> None:
        if not self.probe_s > 0:
            raise ValueError(f"plan.probe_s must be positive, got {self.probe_s}")
        if self.max_steps < 1:
            raise ValueError(f"plan.max_steps must be at least 1, got {self.max_steps}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: what is distilled, how, and where it is written."""

    name: str | None = None
    """Directory of the run under storage_path; default: the preset's name, or else the source's
    kind.
    """
    storage_path: str = "runs"
    """Where runs and their cache live: a directory, or the URI of an object store."""
    seed: int = 0
    """Every random draw of the run follows from it."""
    ipc: int = 1
    """Stored synthetic images per class."""
    method: MethodName | None = None
    """A published method, which sets its hyperparameters of distill, frequencies, synthetic and
    augment, for this ipc and shard.image_size; other options given beside it override them. None:
    the options as they are. dm: mean features of random networks. dance: of trained ones, with
    their cross-entropy. tgdd: of snapshots, with a later snapshot's cross-entropy. ncfm, ncfm_psi:
    characteristic functions at fixed and at learned frequencies."""
    num_workers: int | None = None
    """Workers of a stage; default: one a GPU, or else one a CPU."""
    use_gpu: bool | None = None
    """Whether workers take a GPU each; default: if the cluster has any by then. Where nodes come on
    demand, true asks for them, num_workers of them, and waits.
    """
    source: SourceConfig = field(default_factory=SourceConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network of the pool and of the evaluation."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    frequencies: FrequencyConfig = field(default_factory=FrequencyConfig)
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(strategy="color_crop_cutout", single=False)
    )
    """Siamese augmentation of real and synthetic images while distilling; the default is the
    released code's."""
    curate: CurateConfig = field(default_factory=CurateConfig)
    """Soft labels, evaluated as a set of their own."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    search_proxy: SearchProxyConfig = field(default_factory=SearchProxyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if self.ipc < 1:
            raise ValueError(f"ipc must be at least 1, got {self.ipc}")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.synthetic.factor > self.shard.image_size:
            raise ValueError(
                f"synthetic.factor must not exceed shard.image_size, "
                f"got {self.synthetic.factor} > {self.shard.image_size}"
            )
        if self.distill.extractor != "blend" and not self.pretrain.snapshot_every:
            raise ValueError(
                f"distill.extractor {self.distill.extractor!r} needs snapshots of the pool's "
                "training: set pretrain.snapshot_every, got 0"
            )
        if self.name is not None and (
            not self.name or "/" in self.name or self.name in ("cache", ".", "..")
        ):
            raise ValueError(
                f"name must be a plain directory name other than 'cache', got {self.name!r}"
            )
        try:
            UPath(self.storage_path)
        except ValueError as error:
            raise ValueError(f"storage_path {self.storage_path}: {error}") from error

    def method_changes(self) -> list[str]:
        """The options whose values are not those of the method that is named, if one is."""
        if self.method is None:
            return []
        options = dict(flat("", dataclasses.asdict(self)))
        sizes = {"ipc": self.ipc, "image_size": self.shard.image_size}
        return method_changes(self.method, options, **sizes)

    @property
    def storage(self) -> UPath:
        """storage_path, absolute if it is local. An object store is asked anew what it holds
        whenever that matters, for many processes write there.
        """
        path = UPath(self.storage_path)
        if isinstance(path, Path):
            return path.absolute()
        return UPath(path, use_listings_cache=False)

    @property
    def run_directory(self) -> UPath:
        """<storage_path>/<name>."""
        return self.storage / (self.name or self.source.kind)

    def cache(self, stage: str, fingerprint: str) -> UPath:
        """<storage_path>/cache/<stage>-<fingerprint>, shared by all runs of one storage path."""
        return self.storage / "cache" / f"{stage}-{fingerprint}"


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    stages: tuple[str, ...]
    config: RunConfig
    toml: str  # the resolved configuration


class UsageError(Exception):
    """The command line or the configuration is wrong; the message is one line that says what,
    where, and what fits.
    """


def missing_package(option: str, extra: str) -> UsageError:
    """The error of an option that needs an extra of pyproject.toml which is not installed."""
    return UsageError(
        f"{option} needs the extra {extra}: `uv run --extra {extra} pipeline/run.py ...`, "
        f"or `pip install '.[{extra}]'` in a checkout"
    )


def parse_command(argv: Sequence[str]) -> Command:
    """The stages to run and the resolved configuration. Raises UsageError.

    `--help` and `--print_config` print and exit.
    """
    stages: tuple[str, ...] = STAGES
    options = list(argv)
    if options and not options[0].startswith("-"):
        stages = (options.pop(0),)
        if stages[0] not in STAGES + EXTRA_STAGES:
            known = ", ".join(STAGES + EXTRA_STAGES)
            raise UsageError(f"no stage {stages[0]!r}; the stages are {known}, and compare")
        if stages[0] == "export":
            options = [re.sub(r"^--to(?==|$)", "--export.to", option) for option in options]
    preset = _preset_of(options)
    parser = _parser([] if preset else [PRESETS / "builtin.toml"])
    given = parser.parse_args(options)
    options = _with_named(parser, options, given, "method", _settings_of_method)
    options = _with_named(parser, options, given, "evaluate.protocol", _settings_of_protocol)
    namespace = parser.parse_args(options)
    if namespace.name is None:
        namespace.name = Path(preset).stem if preset else namespace.source.kind
    config = _build(parser, namespace)
    settings = namespace.clone()
    settings.pop("config", None)
    return Command(stages, config, parser.dump(settings, skip_none=True))


def _settings_of_method(name: str, given: Namespace) -> dict[str, Any]:
    return method_settings(name, ipc=given.ipc, image_size=given.shard.image_size)


def _settings_of_protocol(name: str, _: Namespace) -> dict[str, Any]:
    return settings(name)


def _with_named(
    parser: ArgumentParser,
    options: list[str],
    given: Namespace,
    key: str,
    settings_of: Callable[[str, Namespace], dict[str, Any]],
) -> list[str]:
    """What the evaluation protocol or the method sets that is named by an option: as defaults if
    the preset names it, else as options before those of the command line.
    """
    flag, named = f"--{key}", None
    for option, value in zip(options, [*options[1:], ""], strict=False):
        if option == flag or option.startswith(f"{flag}="):
            named = option.partition("=")[2] or value
    if named is None:
        if given[key] is not None:
            parser.set_defaults(settings_of(given[key], given))
        return options
    wanted = settings_of(named, given)
    first = next((i for i, o in enumerate(options) if o == "--config"), -2) + 2
    first = max(first, sum(option.startswith("--config=") for option in options[:1]))
    added = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in wanted.items()
    ]
    return [*options[:first], *added, *options[first:]]


def changed_command(toml: str, values: Mapping[str, object]) -> Command:
    """A resolved configuration with some dotted options changed, checked as if they had been given
    on the command line. Raises UsageError.
    """
    parser = _plain_parser()
    namespace = check_types(toml, values)
    return Command(STAGES, _build(parser, namespace), parser.dump(namespace, skip_none=True))


def check_types(toml: str, values: Mapping[str, object]) -> Namespace:
    """As `changed_command`, but values that do not fit each other are not found."""
    tree = tomllib.loads(toml)
    for key, value in values.items():
        *groups, name = key.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    namespace: Namespace = _plain_parser().parse_object(tree)
    return namespace


@functools.cache
def _plain_parser() -> ArgumentParser:
    """A parser without a default preset, made once: it takes a second, and a search needs many."""
    return _parser([])


def _parser(defaults: list[Path]) -> ArgumentParser:
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True
    )
    parser = _Parser(
        prog="pipeline/run.py",
        usage="python pipeline/run.py [STAGE] [--config PRESET.toml] [--key.sub VALUE ...]",
        description=f"STAGE is one of {', '.join(STAGES)}; without one, all of them run in order. "
        f"Others run when they are named: {', '.join(EXTRA_STAGES)}, and compare RUN RUN ...",
        parser_mode="toml",
        default_config_files=list(map(str, defaults)),
    )
    parser.add_argument(
        "--config", action="config", help="a TOML preset; the default is the built-in photographs"
    )
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    return parser


class _Parser(ArgumentParser):
    """An ArgumentParser whose errors are exceptions, of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        line = re.sub(r"<class '(\w+)'>", r"\1", line.replace("<class 'NoneType'>", "nothing"))
        line = re.sub(r"(a )?typing\.Literal\[(.*?)\]", r"one of \2", line)
        if re.search(r"(?<![.\w])stream['\".]", line):
            line = (
                "the options stream.* are gone: real images are read from a store on disk, which "
                "needs no budget of memory; remove them (runtime.local_directory says where it is)"
            )
        union = r"Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)"
        line = re.sub(union, r"Expected \1. Got value: \2", line)
        line = line.replace(", nothing.", " or nothing.")
        if line.startswith("unrecognized arguments: "):
            given = line.split()[2].partition("=")[0]
            near = get_close_matches(given, self._option_string_actions, n=1, cutoff=0.75)
            line += f"; did you mean {near[0]}?" if near else "; --help lists all options"
        raise UsageError(re.sub(r'Parser key "([\w.]+)"', r"--\1", line)) from ex


def _build(parser: ArgumentParser, namespace: Namespace) -> RunConfig:
    try:
        built = parser.instantiate_classes(namespace)
        return RunConfig(**{name: built[name] for name in RunConfig.__dataclass_fields__})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _preset_of(argv: Sequence[str]) -> str | None:
    """The preset named on the command line; it must come before any other option, which it would
    silently undo.
    """
    values = [i for i, a in enumerate(argv) if a == "--config" or a.startswith("--config=")]
    if not values:
        return None
    first = values[0]
    if first > 0:
        raise UsageError(f"--config must come before the options that change it: {argv[0]} ...")
    preset = argv[0].partition("=")[2] or (argv[1] if len(argv) > 1 else "")
    try:
        found = UPath(preset).is_file()
    except Exception as error:  # of whatever kind the library of an object store has for it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"cannot read --config {preset}: {reason}") from error
    if not found:
        known = ", ".join(sorted(path.name for path in PRESETS.glob("*.toml")))
        raise UsageError(f"--config needs a preset file, got {preset!r}; in {PRESETS} are {known}")
    return preset


def exit_with_usage_error(error: Exception) -> NoReturn:
    """End with status 2 and one line."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(2)
