"""Search space: the ranges of the searched options, and seeded draws from them."""

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

SEARCHED = ("ipc", "ipc_allocation", "shard", "model", "pretrain", "synthetic", "distill",
    "frequencies", "augment")  # fmt: skip
INPUTS = ("shard", "model", "pretrain")
"""Options that change shards or networks, which are built before the trials start."""
RUNG_OPTION = "distill.num_steps"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Range of one searched option; exactly one of the four fields is given."""

    choice: list[Value] | None = None
    """One of these values, with equal probability."""
    grid: list[Value] | None = None
    """All of these values, each combined with every draw of the other options."""
    uniform: tuple[float, float] | None = None
    """Uniform between two numbers; rounded for integer options."""
    loguniform: tuple[float, float] | None = None
    """Log-uniform between two numbers; rounded for integer options."""

    def problem(self) -> str | None:
        """Why the range is invalid, or None."""
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
        """All listed values, or the two bounds."""
        listed = self.grid or self.choice
        if listed:
            return list(listed)
        ends = self.uniform or self.loguniform
        assert ends is not None
        return [round(end) if integer else end for end in ends]

    def contains(self, value: object) -> bool:
        """Whether the range contains a value."""
        if self.choice is not None or self.grid is not None:
            return value in (self.choice or self.grid or ())
        low, high = self.uniform or self.loguniform or (0.0, 0.0)
        return isinstance(value, (int, float)) and low <= value <= high

    def draw(self, uniform: float, *, integer: bool) -> Value:
        """Map a uniform number in [0, 1) to a value of the range."""
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
    """Hyperparameter search, by accuracy on images held out of train."""

    space: dict[str, Range] = field(default_factory=dict)
    """Dotted option -> its range: [tune.space."distill.lr"] loguniform = [1e-3, 1e-1]."""
    samples: int = 16
    """Draws from the space, the first being the preset's own values; each is run with every
    combination of the grids."""
    sampler: Literal["random", "optuna"] = "random"
    """`random`: draw n depends only on the seed and n. `optuna`: TPE, which learns from earlier
    trials; two objectives, accuracy and stored bytes, if the latter vary."""
    rungs: tuple[float, ...] = (1 / 9, 1 / 3, 1.0)
    """Fractions of distill.num_steps after which a trial is evaluated, and stopped if unpromising
    (asynchronous successive halving); after the last rung it is finished."""
    reduction_factor: float = 3.0
    """About one in this many trials continues beyond a rung. Rungs of [1.0] stop no trial."""
    selection_fraction: float = 0.1
    """Fraction of each training class held out to evaluate trials if source.selection_fraction
    is 0."""
    repeats: int = 1
    """Fresh networks per rung."""
    epochs: int = 200
    """Training epochs of each network; other training options are those of `evaluate`."""
    cpus_per_trial: float = 1.0
    """CPUs, and threads, per trial. As many trials run at once as fit the cluster."""
    gpus_per_trial: float = 1.0
    """GPUs per trial if GPUs are used; small networks can share one: 0.25."""
    max_concurrent: int | None = None
    """Maximum concurrent trials; default: as many as fit when the search starts."""
    retries: int = 2
    """Retries of a failed trial."""

    def __post_init__(self) -> None:
        for key, values in self.space.items():
            if problem := values.problem():
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
        grids = [key for key, values in self.space.items() if values.grid is not None]
        if self.sampler == "optuna" and grids:
            raise ValueError(f"tune.sampler optuna needs choice, not grid: {', '.join(grids)}")

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The rungs in steps, strictly increasing."""
        steps: list[int] = []
        for fraction in self.rungs:
            steps.append(max(round(fraction * num_steps), steps[-1] + 1 if steps else 1))
        return tuple(steps)

    @property
    def grid_size(self) -> int:
        """Trials per draw."""
        return math.prod(len(values.grid) for values in self.space.values() if values.grid)

    @property
    def num_trials(self) -> int:
        """Total number of trials."""
        return self.samples * self.grid_size


def option_type(config_class: type, key: str) -> Any:
    """The type of a dotted option of a configuration class. Raises KeyError, with the closest
    option, if there is none.
    """
    hint: Any = config_class
    for name in key.split("."):
        fields = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if name not in fields:
            near = get_close_matches(key, option_names(config_class), n=1)
            raise KeyError(f"no option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        hint = fields[name]
    if dataclasses.is_dataclass(hint):
        raise KeyError(f"{key!r} is a group of options, not one")
    return hint


def option_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """All dotted options of a configuration class."""
    for name, hint in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from option_names(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def integer_options(config_class: type, space: Mapping[str, Range]) -> set[str]:
    """The integer options of a space."""
    hints = {key: option_type(config_class, key) for key in space}
    return {k for k, hint in hints.items() if hint is int or int in get_args(hint)} - {
        k for k, hint in hints.items() if float in get_args(hint)
    }


def sample(
    config: TuneConfig, number: int, *, seed: int, integers: set[str], first: Values
) -> Values:
    """Values of a trial of the `random` sampler. The first draw uses the values of `first`, so the
    search does no worse, on its held-out images, than the initial configuration.

    A draw depends only on (seed, number, option): more samples or options leave the others
    unchanged.
    """
    draw, place = divmod(number, config.grid_size)
    grids = {key: option.grid for key, option in config.space.items() if option.grid}
    point = dict(zip(grids, list(itertools.product(*grids.values()))[place], strict=True))
    values: Values = {}
    for key, option in config.space.items():
        if key in point:
            values[key] = point[key]
        elif draw == 0 and key in first:
            values[key] = first[key]
        else:
            generator = keyed_generator(seed, "tune", draw, key)
            uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
            values[key] = option.draw(uniform, integer=key in integers)
    return values


def override(config: Any, values: Mapping[str, Any]) -> Any:
    """Replace dotted options of a configuration. Raises ValueError as its classes do."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        groups.setdefault(name, {})[rest] = value
    changed = {
        name: inner[""] if "" in inner else override(getattr(config, name), inner)
        for name, inner in groups.items()
    }
    return dataclasses.replace(config, **changed)
