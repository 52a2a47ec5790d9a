"""Samplers of a search's trials, and validation of its space."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from upath import UPath

from ncfm.seeding import keyed_seed
from pipeline.errors import UsageError, missing_package
from pipeline.observe.progress import values_text
from pipeline.runtime.files import read_json, write_atomic
from pipeline.runtime.identity import dotted, fingerprint
from pipeline.stages.tuning import TUNE_VERSION
from pipeline.stages.tuning.search_space import (
    INPUTS,
    RUNG_OPTION,
    SEARCHED,
    TuneConfig,
    Value,
    Values,
    integer_options,
    option_type,
    override,
    sample,
)

if TYPE_CHECKING:
    from pipeline.cli import Command
    from pipeline.config import RunConfig


def check_search(command: "Command") -> None:
    """Raise UsageError if the space is invalid: an unknown option, one that cannot be searched, a
    value of the wrong type, values that do not form a configuration.
    """
    config = command.config
    space = config.tune.space
    if not space:
        raise UsageError(
            'tune needs a space in its preset, such as [tune.space."distill.lr"] '
            "loguniform = [1e-3, 1e-1]"
        )
    for key, choices in space.items():
        try:
            option_type(type(config), key)
        except KeyError as error:
            raise UsageError(f"tune.space: {error.args[0]}") from None
        group = key.partition(".")[0]
        if group not in SEARCHED or key == RUNG_OPTION:
            raise UsageError(
                f"tune.space {key!r}: searchable are {', '.join(SEARCHED)}, except {RUNG_OPTION}"
            )
        if config.tune.sampler == "optuna" and group in INPUTS and choices.choice is None:
            raise UsageError(
                f"tune.space {key!r}: with tune.sampler optuna, options that change shards or "
                "networks need a choice: these are built before the trials"
            )
        # Constraints between searched options of a group are checked jointly, below.
        alone = not any(k != key and k.partition(".")[0] == group for k in space)
        check = command.changed if alone else command.check_types
        for value in choices.extremes(integer=key in integer_options(type(config), space)):
            try:
                check({key: value})
            except UsageError as error:
                raise UsageError(f"tune.space {key!r}: {error}") from None
    if config.tune.sampler == "optuna":
        if find_spec("optuna") is None:
            raise missing_package("tune.sampler optuna", "optuna")
        return
    sampler = RandomSampler(config)
    for number, values in sampler.known().items():
        try:
            override(config, values)
        except ValueError as error:
            raise UsageError(
                f"trial {number} of tune.space ({values_text(values)}): {error}"
            ) from None


def own_values(config: "RunConfig") -> Values:
    """The configuration's own values of the searched options."""
    options = dotted(dataclasses.asdict(config))
    return {key: options[key] for key in config.tune.space}


@dataclass(frozen=True)
class Outcome:
    """A trial, ended or running, as a sampler learns from it."""

    values: Values
    accuracy: float | None  # None: none yet
    stored_bytes: int
    ended: bool


class Sampler(Protocol):
    """Source of the trials' values."""

    def known(self) -> dict[int, Values]:
        """The trials whose values are already fixed, by number."""
        ...

    def values(self, number: int, outcomes: Sequence[Outcome]) -> Values:
        """The values of a trial, given the outcomes of earlier ones."""
        ...


class RandomSampler:
    """Random search: a trial depends only on the seed and its number."""

    def __init__(self, config: "RunConfig") -> None:
        self._config, self._seed, self._first = config.tune, config.seed, own_values(config)
        self._integers = integer_options(type(config), config.tune.space)

    def known(self) -> dict[int, Values]:
        """All of them."""
        return {number: self.values(number, ()) for number in range(self._config.num_trials)}

    def values(self, number: int, outcomes: Sequence[Outcome]) -> Values:
        """See Sampler; the outcomes are ignored."""
        del outcomes
        return sample(
            self._config, number, seed=self._seed, integers=self._integers, first=self._first
        )


class OptunaSampler:
    """Optuna's TPE: a trial depends on the seed, its number, and the outcomes when it started.

    Suggestions are saved before they are used, so that an interrupted search repeats them.
    """

    def __init__(self, config: "RunConfig", directory: UPath) -> None:
        self._config, self._seed, self._first = config.tune, config.seed, own_values(config)
        self._integers = integer_options(type(config), config.tune.space)
        identity = fingerprint(TUNE_VERSION, config.tune.space, config.seed, self._first)
        self._path = directory / f"optuna-{identity}.json"
        self._known: dict[int, Values] = {
            int(number): values for number, values in (read_json(self._path) or {}).items()
        }

    def known(self) -> dict[int, Values]:
        """The suggestions so far."""
        return {n: v for n, v in self._known.items() if n < self._config.num_trials}

    def values(self, number: int, outcomes: Sequence[Outcome]) -> Values:
        """See Sampler."""
        if number not in self._known:
            self._known[number] = self._suggest(number, outcomes)
            write_atomic(self._path, json.dumps(self._known, indent=1))
        return self._known[number]

    def _suggest(self, number: int, outcomes: Sequence[Outcome]) -> Values:
        space = self._config.space
        if number == 0 and all(r.contains(self._first.get(k)) for k, r in space.items()):
            return dict(self._first)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        distributions = {key: self._distribution(key) for key in self._config.space}
        trade_off = len({outcome.stored_bytes for outcome in outcomes}) > 1
        study = optuna.create_study(
            directions=["maximize", "minimize"] if trade_off else ["maximize"],
            sampler=optuna.samplers.TPESampler(
                seed=keyed_seed(self._seed, "optuna", number) % 2**32, constant_liar=True
            ),
        )
        for outcome in outcomes:
            complete = outcome.ended and outcome.accuracy is not None
            state = (
                optuna.trial.TrialState.COMPLETE
                if complete
                else (
                    optuna.trial.TrialState.FAIL
                    if outcome.ended
                    else optuna.trial.TrialState.RUNNING
                )
            )
            objectives = [outcome.accuracy or 0.0, outcome.stored_bytes][: 1 + trade_off]
            study.add_trial(
                optuna.create_trial(
                    state=state,
                    params=outcome.values,
                    distributions=distributions,
                    values=objectives if complete else None,
                )
            )
        suggested: Values = dict(study.ask(distributions).params)
        return suggested

    def _distribution(self, key: str) -> Any:
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        option = self._config.space[key]
        if option.choice is not None:
            return CategoricalDistribution(option.choice)
        low, high = option.extremes(integer=key in self._integers)
        distribution = IntDistribution if key in self._integers else FloatDistribution
        return distribution(low, high, log=option.loguniform is not None)


def build_sampler(config: "RunConfig", directory: UPath) -> Sampler:
    """The configured sampler."""
    if config.tune.sampler == "optuna":
        return OptunaSampler(config, directory)
    return RandomSampler(config)


def input_values(config: TuneConfig, sampler: Sampler) -> list[Values]:
    """Distinct values, over all trials, of the options that change shards or networks."""
    keys = [key for key in config.space if key.partition(".")[0] in INPUTS]
    points: list[dict[str, Value]] = [{}]
    if config.sampler == "optuna":
        for key in keys:
            points = [{**point, key: v} for point in points for v in config.space[key].choice or ()]
        return points
    points = [{key: values[key] for key in keys} for values in sampler.known().values()]
    return [point for i, point in enumerate(points) if point not in points[:i]]
