"""Command line: presets, options generated from the configuration dataclasses, error messages."""

import functools
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from upath import UPath

from ncfm.models import ModelConfig
from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.methods import method_settings
from pipeline.stages.presets import PRESETS
from pipeline.stages.protocols import protocol_settings

STAGES = ("shard", "pretrain", "distill", "evaluate", "report")
EXTRA_STAGES = ("tune", "plan", "audit", "continual", "search-proxy", "export", "clean", "presets",
    "doctor")  # fmt: skip # if named


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    stages: tuple[str, ...]
    config: RunConfig
    toml: str  # the resolved configuration

    def changed(self, values: Mapping[str, object]) -> "Command":
        """A command with some dotted options changed and all stages, validated like options of the
        command line. Raises UsageError.
        """
        namespace = self.check_types(values)
        parser = _plain_parser()
        return Command(STAGES, _build(parser, namespace), parser.dump(namespace, skip_none=True))

    def check_types(self, values: Mapping[str, object]) -> Namespace:
        """As `changed`, but checks types only, not constraints between options."""
        tree = tomllib.loads(self.toml)
        for key, value in values.items():
            *groups, name = key.split(".")
            inner = tree
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[name] = value
        namespace: Namespace = _plain_parser().parse_object(tree)
        return namespace


def parse_command(argv: Sequence[str]) -> Command:
    """Parse the stages to run and the resolved configuration. Raises UsageError.

    `--help` and `--print_config` print and exit.
    """
    stages: tuple[str, ...] = STAGES
    options = list(argv)
    if options and not options[0].startswith("-"):
        stages = (options.pop(0),)
        if stages[0] not in STAGES + EXTRA_STAGES and "." not in stages[0]:
            known = ", ".join(STAGES + EXTRA_STAGES)
            raise UsageError(f"no stage {stages[0]!r}; the stages are {known}, and compare")
        if stages[0] == "export":
            options = [re.sub(r"^--(to|push)(?==|$)", r"--export.\1", word) for word in options]
    presets, options = _presets_first(options)
    parser = _parser([] if presets else [PRESETS / "builtin.toml"])
    given = parser.parse_args(options)
    options = _with_named(parser, options, given, "model.name", _settings_of_model)
    options = _with_named(parser, options, given, "method", _settings_of_method)
    options = _with_named(parser, options, given, "evaluate.protocol", _settings_of_protocol)
    namespace = parser.parse_args(options)
    if namespace.name is None:
        namespace.name = Path(presets[-1]).stem if presets else namespace.source.kind
    config = _build(parser, namespace)
    settings = namespace.clone()
    settings.pop("config", None)
    return Command(stages, config, parser.dump(settings, skip_none=True))


def _settings_of_model(name: str, _: Namespace) -> dict[str, Any]:
    """A preset's depth and width are those of its ConvNet, not of another network."""
    sizes = {f"model.{size}": getattr(ModelConfig, size) for size in ("depth", "width")}
    return {} if ModelConfig(name=name).has_sizes else sizes


def _settings_of_method(name: str, given: Namespace) -> dict[str, Any]:
    return method_settings(name, ipc=given.ipc, image_size=given.shard.image_size)


def _settings_of_protocol(name: str, _: Namespace) -> dict[str, Any]:
    return protocol_settings(name)


def _with_named(
    parser: ArgumentParser,
    options: list[str],
    given: Namespace,
    key: str,
    settings_of: Callable[[str, Namespace], dict[str, Any]],
) -> list[str]:
    """Apply the settings of the protocol or method named by option `key`: as defaults if the preset
    names it, else as options before those of the command line.
    """
    flag, named = f"--{key}", None
    for option, value in zip(options, [*options[1:], ""], strict=False):
        if option == flag or option.startswith(f"{flag}="):
            named = option.partition("=")[2] or value
    chosen = given[key] if named is None else named
    if chosen is None:
        return options
    try:
        settings = settings_of(chosen, given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if named is None:
        parser.set_defaults(settings)
        return options
    first = 2 * options.count("--config")  # presets come first
    added = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]
    return [*options[:first], *added, *options[first:]]


@functools.cache
def _plain_parser() -> ArgumentParser:
    """A cached parser without a default preset: building one takes 1 s, and a search needs many."""
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
        "--config",
        action="config",
        help="a TOML preset; the default is the built-in photographs. Several: later ones win",
    )
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    if "_ARGCOMPLETE" in os.environ:
        _offer_words(parser)
    return parser


def _offer_words(parser: ArgumentParser) -> None:
    """Complete the stages, and the words that an option may be, in a shell (argcomplete)."""
    for action in parser._actions:
        words = _words(getattr(action, "_typehint", None))
        action.completer = lambda *, found=words, **_: found  # type: ignore[attr-defined]
    parser.add_argument("stage", nargs="?", choices=(*STAGES, *EXTRA_STAGES, "compare"))


def _words(hint: Any) -> list[str]:
    """The words of a Literal or a bool, also within a union; none of other types."""
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    unions = (Union, UnionType)
    return [w for one in get_args(hint) for w in _words(one)] if get_origin(hint) in unions else []


class _Parser(ArgumentParser):
    """ArgumentParser that raises UsageError with a one-line message."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(message.split())
        line = re.sub(r"<class '(\w+)'>", r"\1", line.replace("<class 'NoneType'>", "nothing"))
        line = re.sub(r"(a )?typing\.Literal\[(.*?)\]", r"one of \2", line)
        if re.search(r"(?<![.\w])stream['\".]", line):
            line = (
                "the options stream.* are gone: real images are read from a store on disk, which "
                "needs no memory budget; remove them (runtime.local_directory sets its place)"
            )
        if "legacy_every" in line:
            line = "the option evaluate.legacy_every is now evaluate.best_on_test_every"
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


def _presets_first(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The named presets, and the options with these moved to the front: later presets override
    earlier ones, and options override all presets.
    """
    presets, others = list[str](), list[str]()
    words = iter(argv)
    for word in words:
        if word == "--config":
            presets.append(next(words, ""))
        elif word.startswith("--config="):
            presets.append(word.partition("=")[2])
        else:
            others.append(word)
    for preset in presets:
        _check_preset(preset)
    return presets, [*(word for preset in presets for word in ("--config", preset)), *others]


def _check_preset(preset: str) -> None:
    try:
        exists = UPath(preset).is_file()
    except Exception as error:  # object store libraries raise errors of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"cannot read --config {preset}: {reason}") from error
    if not exists:
        known = ", ".join(sorted(path.name for path in PRESETS.glob("*.toml")))
        raise UsageError(f"--config needs a preset file, got {preset!r}; in {PRESETS} are {known}")


def exit_with_usage_error(error: Exception) -> NoReturn:
    """Print a one-line error and exit with status 2."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    sys.exit(2)
