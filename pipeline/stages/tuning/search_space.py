"""The space of a search: which options vary and how, drawn from the seed alone."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

import torch

from ncfm.seeding import keyed_generator

Value = int | float | str | bool
Values = dict[str, Value]
"""Dotted option -> its value in one trial."""

SEARCHED = ("ipc", "shard", "model", "pretrain", "synthetic", "distill", "frequencies", "augment")
INPUTS = ("shard", "model", "pretrain")
"""Options that change shards or networks, which are made before the trials start."""
RUNG_OPTION = "distill.num_steps"


@dataclass(frozen=True, kw_only=True)
class Range:
    """What one option may be; exactly one of the four is given."""

    choice: list[Value] | None = None
    """One of these, each as likely."""
    grid: list[Value] | None = None
    """Each of these, together with every draw of the other options."""
    uniform: tuple[float, float] | None = None
    """Between two numbers; rounded where the option is an integer."""
    loguniform: tuple[float, float] | None = None
    """As uniform, on a logarithmic scale."""

    def problem(self) -> str | None:
        """What is wrong with it, if something is."""
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            return f"needs exactly one of {', '.join(self.__dataclass_fields__)}, got {given}"
        values = getattr(self, given[0])
        if not values:
            return f"{given[0]} is empty"
        if given[0] in ("choice", "grid"):
            return None
        low, high = values
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return f"{given[0]} must be two rising numbers, got [{low:g}, {high:g}]"
        if given[0] == "loguniform" and low <= 0:
            return f"loguniform must be two positive numbers, got [{low:g}, {high:g}]"
        return None

    def extremes(self, *, integer: bool) -> list[Value]:
        """All values, or the two ends."""
        listed = self.grid or self.choice
        if listed:
            return list(listed)
        ends = self.uniform or self.loguniform
        assert ends is not None
        return [round(end) if integer else end for end in ends]

    def contains(self, value: object) -> bool:
        """Whether a draw can be this value."""
        if self.choice is not None or self.grid is not None:
            return value in (self.choice or self.grid or ())
        low, high = self.uniform or self.loguniform or (0.0, 0.0)
        return isinstance(value, (int, float)) and low <= value <= high

    def draw(self, uniform: float, *, integer: bool) -> Value:
        """The value at a place within [0, 1)."""
        if self.choice:
            return self.choice[int(uniform * len(self.choice))]
        if self.loguniform:
            low, high = map(math.log, self.loguniform)
            value = math.exp(low + uniform * (high - low))
        else:
            assert self.uniform is not None
            low, high = self.uniform
            value = low + uniform * (high - low)
        return round(value) if integer else value


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Stage tune: a search over other options, by accuracy on images held out of train."""

    space: dict[str, Range] = field(default_factory=dict)
    """Dotted option -> its range: [tune.space."distill.lr"] loguniform = [1e-3, 1e-1]."""
    samples: int = 16
    """Draws from the space, the first of them the preset's own values; each is tried with every
    combination of the grids."""
    sampler: Literal["random", "optuna"] = "random"
    """`random`: draw n follows from the seed alone. `optuna`: TPE, which learns from the trials
    before; of accuracy and stored bytes, if the latter vary."""
    rungs: tuple[float, ...] = (1 / 9, 1 / 3, 1.0)
    """Fractions of distill.num_steps after which a trial is evaluated, and stopped if it is
    hopeless (asynchronous successive halving); after the last it is finished."""
    reduction_factor: float = 3.0
    """About one of so many trials goes on beyond a rung. Rungs of [1.0] stop nobody."""
    selection_fraction: float = 0.1
    """Part of each class of train that judges the trials, where source.selection_fraction is 0."""
    repeats: int = 1
    """Fresh networks a rung."""
    epochs: int = 200
    """Epochs of each; the rest of their training is that of `evaluate`."""
    cpus_per_trial: float = 1.0
    """CPUs, and threads, of a trial. As many trials run at once as the cluster has room for."""
    gpus_per_trial: float = 1.0
    """GPUs of a trial where GPUs are used; small networks may share one: 0.25."""
    max_concurrent: int | None = None
    """Trials at once; default: as many as there is room for when the search starts."""
    retries: int = 2
    """How often a trial that failed is started again."""

    def __post_init__(self) -> None:
        for key, found in self.space.items():
            if problem := found.problem():
                raise ValueError(f"tune.space {key!r} {problem}")
        for name in ("samples", "repeats", "epochs", "max_concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"tune.{name} must be at least 1, got {value}")
        rising = all(low < high for low, high in itertools.pairwise((0.0, *self.rungs)))
        if not self.rungs or not rising or self.rungs[-1] > 1:
            raise ValueError(f"tune.rungs must be rising fractions within (0, 1], got {self.rungs}")
        if not self.reduction_factor > 1:
            raise ValueError(f"tune.reduction_factor must exceed 1, got {self.reduction_factor}")
        if not 0 < self.selection_fraction < 1:
            raise ValueError(
                f"tune.selection_fraction must be within (0, 1), got {self.selection_fraction}"
            )
        for name in ("cpus_per_trial", "gpus_per_trial"):
            if not getattr(self, name) > 0:
                raise ValueError(f"tune.{name} must be positive, got {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"tune.retries must not be negative, got {self.retries}")
        grids = [key for key, found in self.space.items() if found.grid is not None]
        if self.sampler == "optuna" and grids:
            raise ValueError(f"tune.sampler optuna knows no grid, but choice: {', '.join(grids)}")

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The rungs in steps; each at least one more than the one before."""
        found: list[int] = []
        for fraction in self.rungs:
            found.append(max(round(fraction * num_steps), found[-1] + 1 if found else 1))
        return tuple(found)

    @property
    def grid_size(self) -> int:
        """Trials a draw."""
        return math.prod(len(found.grid) for found in self.space.values() if found.grid)

    @property
    def num_trials(self) -> int:
        """Trials of the search."""
        return self.samples * self.grid_size


def option_type(config_class: type, key: str) -> Any:
    """The type of a dotted option of a configuration class; KeyError, with what is near, if there
    is none.
    """
    found: Any = config_class
    for name in key.split("."):
        fields = get_type_hints(found) if dataclasses.is_dataclass(found) else {}
        if name not in fields:
            near = get_close_matches(key, option_names(config_class), n=1)
            raise KeyError(f"no option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        found = fields[name]
    if dataclasses.is_dataclass(found):
        raise KeyError(f"{key!r} is a group of options, not one")
    return found


def option_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """All dotted options of a configuration class."""
    for name, hint in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from option_names(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def integer_options(config_class: type, space: Mapping[str, Range]) -> set[str]:
    """Those of the space's options that are integers."""
    hints = {key: option_type(config_class, key) for key in space}
    return {k for k, hint in hints.items() if hint is int or int in get_args(hint)} - {
        k for k, hint in hints.items() if float in get_args(hint)
    }


def sample(
    config: TuneConfig, number: int, *, seed: int, integers: set[str], first: Values
) -> Values:
    """The values of a trial under the sampler `random`. The first draw is `first`, where it has a
    value: so a search ends no worse, on its images, than where it began.

    A draw depends on (seed, number, option) alone: with more samples or one more option the others
    stay.
    """
    draw, place = divmod(number, config.grid_size)
    grids = {key: found.grid for key, found in config.space.items() if found.grid}
    point = dict(zip(grids, list(itertools.product(*grids.values()))[place], strict=True))
    values: Values = {}
    for key, found in config.space.items():
        if key in point:
            values[key] = point[key]
        elif draw == 0 and key in first:
            values[key] = first[key]
        else:
            generator = keyed_generator(seed, "tune", draw, key)
            uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
            values[key] = found.draw(uniform, integer=key in integers)
    return values


def override(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration with some dotted options replaced. Raises ValueError as its classes do."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        groups.setdefault(name, {})[rest] = value
    changed = {
        name: inner[""] if "" in inner else override(getattr(config, name), inner)
        for name, inner in groups.items()
    }
    return dataclasses.replace(config, **changed)
