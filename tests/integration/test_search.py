"""What a search tries and what becomes of it, without running any trial."""

import dataclasses
import math
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler, AsyncHyperBandScheduler

from pipeline.cli import PRESETS, parse_command
from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.stages.tuning.halving import Verdict, verdicts
from pipeline.stages.tuning.results import pareto
from pipeline.stages.tuning.search import (
    OptunaSampler,
    Outcome,
    RandomSampler,
    build_sampler,
    check_search,
    input_values,
    own_values,
)
from pipeline.stages.tuning.search_space import Range, TuneConfig, integer_options, override, sample

SPACE = {
    "distill.lr": Range(loguniform=(1e-3, 1e-1)),
    "frequencies.max_ratio": Range(uniform=(1.5, 4.0)),
    "distill.real_batch": Range(uniform=(8.0, 32.0)),
    "frequencies.sampler": Range(choice=["psi", "gaussian"]),
    "ipc": Range(grid=[1, 10]),
}
INTEGERS = integer_options(RunConfig, SPACE)


def command(tmp_path: Path, text: str):
    preset = tmp_path / "search.toml"
    preset.write_text(text)
    return parse_command(["tune", "--config", str(preset)])


# ------------------------------------------------------------------ the space


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "tune needs a space"),
        ('[tune.space."distill.lrr"]\nchoice = [1]', "no option 'distill.lrr'.*distill.lr"),
        ("[tune.space.distill]\nchoice = [1]", "group of options"),
        ('[tune.space."distill.lr"]\nchoice = []', "'distill.lr' choice is empty"),
        ('[tune.space."distill.lr"]\nuniform = [2, 1]', r"rising numbers, got \[2, 1\]"),
        ('[tune.space."distill.lr"]\nuniform = [1, 1]', "rising numbers"),
        ('[tune.space."distill.lr"]\nloguniform = [0, 1]', "positive"),
        ('[tune.space."distill.lr"]\n', "exactly one of"),
        ('[tune.space."distill.lr"]\nchoice = [1]\ngrid = [1]', "exactly one of"),
        ('[tune.space."distill.lr"]\nchoose = [1]', "choose"),
        ('[tune.space."distill.lr"]\nchoice = ["fast"]', "'distill.lr': .*float.*fast"),
        ('[tune.space."frequencies.sampler"]\ngrid = ["psy"]', "gaussian.*psi.*psy"),
        ('[tune.space."distill.lr"]\nuniform = [-1, 1]', "lr must be positive, got -1"),
        ("[tune.space.ipc]\ngrid = [1, 0]", "ipc must be at least 1, got 0"),
        ('[tune.space."evaluate.repeats"]\nchoice = [1]', "searchable are"),
        ('[tune.space."distill.num_steps"]\nchoice = [1]', "searchable are"),
        ('[tune.space."seed"]\nchoice = [1]', "searchable are"),
        ("[tune]\nrungs = [0.5, 0.1]\n[tune.space.ipc]\ngrid = [1]", "tune.rungs must be rising"),
        ('[tune]\nsampler = "optuna"\n[tune.space.ipc]\ngrid = [1]', "needs choice, not grid: ipc"),
        (
            '[tune]\nsampler = "optuna"\n[tune.space."pretrain.training.lr"]\nuniform = [1, 2]',
            "need a choice",
        ),
        (
            '[tune]\nsamples = 1\n[tune.space."frequencies.num_freqs"]\ngrid = [64, 100]\n'
            '[tune.space."frequencies.num_components"]\ngrid = [64]\n'
            '[frequencies]\nsampler = "psi"',
            "trial 1 .*multiple of num_components, got 100 and 64",
        ),
    ],
)
def test_a_space_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        check_search(command(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_options_that_must_fit_each_other_are_judged_together(tmp_path: Path) -> None:
    text = (
        '[tune]\nsamples = 2\n[tune.space."frequencies.num_freqs"]\ngrid = [96]\n'
        '[tune.space."frequencies.num_components"]\ngrid = [6, 12]\n[frequencies]\nsampler = "psi"'
    )
    check_search(command(tmp_path, text))  # 96 alone would not fit the default of 64


def test_optuna_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = command(tmp_path, '[tune]\nsampler = "optuna"\n[tune.space.ipc]\nchoice = [1]')
    monkeypatch.setattr("pipeline.stages.tuning.search.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"uv run --extra optuna pipeline"):
        check_search(found)


def searching(config: TuneConfig, seed: int = 0) -> RunConfig:
    """The default run, searched like this."""
    return RunConfig(tune=config, seed=seed)


def test_draws_follow_from_the_seed_alone() -> None:
    small = TuneConfig(space=SPACE, samples=4)
    found = [sample(small, n, seed=3, integers=INTEGERS, first={}) for n in range(small.num_trials)]
    again = RandomSampler(searching(TuneConfig(space=SPACE, samples=9), seed=3)).known()
    assert [again[n] for n in range(2, 8)] == found[2:], "more samples keep the first ones"
    assert len(again) == 18
    fewer = TuneConfig(space={k: SPACE[k] for k in ("distill.lr", "ipc")}, samples=4)
    for number, values in enumerate(found):
        other = sample(fewer, number, seed=3, integers=INTEGERS, first={})
        assert other == {key: values[key] for key in other}, "other options do not matter"
    assert found != [sample(small, n, seed=4, integers=INTEGERS, first={}) for n in range(8)]
    pairs = list(zip(found[::2], found[1::2], strict=True))
    assert all({**a, "ipc": 10} == b for a, b in pairs), "each draw is tried with the whole grid"


def test_the_first_draw_is_the_presets_own(tmp_path: Path) -> None:
    text = '[distill]\nlr = 0.5\n[tune.space."distill.lr"]\nuniform = [1, 2]\n'
    found = command(tmp_path, text + "[tune.space.ipc]\ngrid = [3, 4]").config
    trials = build_sampler(found, tmp_path).known()
    assert [trials[0], trials[1]] == [{"distill.lr": 0.5, "ipc": n} for n in (3, 4)]
    assert all(1 <= values["distill.lr"] <= 2 for n, values in trials.items() if n > 1)
    inside = own_values(found)
    optuna = TuneConfig(space={"distill.lr": Range(uniform=(0, 1))}, sampler="optuna")
    first = {"distill.lr": inside["distill.lr"]}
    assert OptunaSampler(dataclasses.replace(found, tune=optuna), tmp_path).values(0, ()) == first


def test_draws_fill_their_ranges_evenly() -> None:
    config = TuneConfig(space=SPACE, samples=400)
    values = [sample(config, n, seed=0, integers=INTEGERS, first={}) for n in range(0, 800, 2)]
    logs = sorted(math.log10(v["distill.lr"]) for v in values)
    places = [(log + 3) / 2 for log in logs]  # uniform on [0, 1]; Kolmogorov-Smirnov at 1 %
    assert max(abs(p - k / 400) for k, p in enumerate(places)) < 1.63 / math.sqrt(400)
    batches = [v["distill.real_batch"] for v in values]
    assert {type(b) for b in batches} == {int}
    assert (min(batches), max(batches)) == (8, 32)
    assert 150 < sum(v["frequencies.sampler"] == "psi" for v in values) < 250


def test_values_given_and_values_overridden_are_the_same(tmp_path: Path) -> None:
    found = command(tmp_path, "ipc = 3")
    values = sample(TuneConfig(space=SPACE), 5, seed=0, integers=INTEGERS, first={})
    assert found.changed(values).config == override(found.config, values)


def test_inputs_are_made_once_each() -> None:
    space = {**SPACE, "model.width": Range(choice=[8, 16])}
    config = TuneConfig(space=space, samples=8)
    assert sorted(
        input_values(config, RandomSampler(searching(config))), key=lambda v: v["model.width"]
    ) == [{"model.width": n} for n in (8, 16, 128)], "the first draw is the run's own"
    plain = TuneConfig(space=SPACE, samples=8)
    assert input_values(plain, RandomSampler(searching(plain))) == [{}]


def test_optuna_suggests_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"distill.lr": Range(loguniform=(1e-3, 1e-1)), "ipc": Range(choice=[1, 10])}
    config = TuneConfig(space=space, samples=30, sampler="optuna")

    def play(folder: Path, count: int) -> list[dict]:
        """Accuracy is best at a rate of 0.03."""
        folder.mkdir(exist_ok=True)
        sampler, outcomes = OptunaSampler(searching(config, seed=1), folder), []
        for number in range(count):
            values = sampler.values(number, outcomes)
            accuracy = 1 - abs(math.log10(values["distill.lr"] / 0.03))
            outcomes.append(Outcome(values, accuracy, 100 * values["ipc"], ended=True))
        return [outcome.values for outcome in outcomes]

    whole = play(tmp_path / "a", 30)
    play(tmp_path / "b", 12)
    suggested = OptunaSampler(searching(config, seed=1), tmp_path / "b").known()
    assert suggested == dict(enumerate(whole[:12]))
    assert play(tmp_path / "b", 30) == whole, "interrupted after 12"
    distance = [abs(math.log10(v["distill.lr"] / 0.03)) for v in whole]
    assert sum(distance[20:]) < sum(distance[:10]), "it learns"


def test_the_built_in_search_is_the_default_with_a_space() -> None:
    default, search = (
        tomllib.loads((PRESETS / f"{name}.toml").read_text())
        for name in ("builtin", "builtin_tune")
    )
    assert {key: part for key, part in search.items() if key != "tune"} == default
    found = parse_command(["tune", "--config", str(PRESETS / "builtin_tune.toml")])
    check_search(found)
    assert found.config.tune.num_trials >= 16


# ------------------------------------------------------------------ halving


def decide(results: Sequence[Sequence[float]], groups: Sequence[int] | None = None, **options):
    numbers = range(len(results))
    return verdicts(
        dict(enumerate(results)),
        dict(zip(numbers, groups or [0] * len(results), strict=True)),
        rungs=3,
        reduction_factor=3.0,
        **options,
    )


def test_the_decisions_are_those_of_asha() -> None:
    """Ray's own, given the trials one after the other."""
    draw = random.Random(0)
    results = [[draw.random() for _ in range(3)] for _ in range(40)]
    asha = AsyncHyperBandScheduler(
        "step", "accuracy", "max", max_t=9, grace_period=1, reduction_factor=3
    )
    found = decide(results)
    for number, values in enumerate(results):
        trial = SimpleNamespace(trial_id=str(number))
        asha.on_trial_add(None, trial)
        rungs = 0
        for step, accuracy in zip((1, 3, 9), values, strict=True):
            rungs += 1
            if asha.on_trial_result(None, trial, {"step": step, "accuracy": accuracy}) == "STOP":
                break
        assert found[number].rungs == rungs
        assert found[number].status == ("finished" if rungs == 3 else "stopped")
    assert 10 < sum(verdict.status == "stopped" for verdict in found.values()) < 40


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3, st.integers(0, 3), st.integers(0, 1)), max_size=12)
)
def test_a_verdict_stays_whatever_comes_later(trials: list[tuple[int, ...]]) -> None:
    """So the order in which results come does not matter, nor an interruption."""
    whole = [[float(value) for value in trial[:3]] for trial in trials]
    groups = [trial[4] for trial in trials]
    partial = [values[: trial[3]] for values, trial in zip(whole, trials, strict=True)]
    early, late = decide(partial, groups), decide(whole, groups)
    for number in early:
        if early[number].status == "running":
            assert early[number].rungs <= late[number].rungs
        else:
            assert early[number] == late[number]
    assert all(verdict.status != "running" for verdict in late.values())


def test_sets_of_different_size_are_no_rivals() -> None:
    results = [[0.9] * 3, [0.5] * 3, [0.4] * 3]
    assert decide(results)[1].status == "stopped"
    found = decide(results, groups=[10, 1, 1])
    assert [found[n].status for n in range(3)] == ["finished", "finished", "stopped"]


def test_nobody_waits_for_a_trial_that_failed() -> None:
    results = [[], [0.5] * 3, [0.4] * 3]
    assert decide(results)[1].status == "running"
    found = decide(results, failed=frozenset({0}))
    assert [found[n].status for n in range(3)] == ["failed", "finished", "stopped"]


# ------------------------------------------------------------------ the front


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9), st.booleans()), max_size=12))
def test_the_front_is_what_none_beats(points: list[tuple[int, int, bool]]) -> None:
    rows = [
        {
            "trial": n,
            "stored_bytes": size,
            "accuracy": accuracy / 10,
            "status": "finished" if finished else "stopped",
        }
        for n, (size, accuracy, finished) in enumerate(points)
    ]
    front = [rows[n] for n in pareto(rows)]
    finished = [row for row in rows if row["status"] == "finished"]
    assert all(row in finished for row in front)
    for row in finished:
        assert any(
            f["stored_bytes"] <= row["stored_bytes"] and f["accuracy"] >= row["accuracy"]
            for f in front
        ), "every trial is matched or beaten by one of the front"
    for a in front:
        for b in front:
            if a is not b:
                assert a["stored_bytes"] != b["stored_bytes"]
                assert (a["stored_bytes"] < b["stored_bytes"]) == (a["accuracy"] < b["accuracy"])


def test_rays_own_halving_depends_on_the_order_of_arrival() -> None:
    """Why `halving` is not Ray Tune's ASHAScheduler: the same results, other trials stopped."""
    accuracies = [0.1, 0.4, 0.2, 0.3]

    def stopped(order: Sequence[int]) -> set[int]:
        scheduler = ASHAScheduler(
            time_attr="step", metric="accuracy", mode="max", max_t=9, reduction_factor=3
        )
        trials = [SimpleNamespace(trial_id=str(number)) for number in range(4)]
        for trial in trials:
            scheduler.on_trial_add(None, trial)
        results = {
            n: scheduler.on_trial_result(None, trials[n], {"step": 1, "accuracy": accuracies[n]})
            for n in order
        }
        return {n for n, decision in results.items() if decision == scheduler.STOP}

    assert stopped([0, 1, 2, 3]) != stopped([3, 2, 1, 0])

    def ours(order: Sequence[int]) -> dict[int, Verdict]:
        results = {n: [accuracies[n]] for n in order}
        return verdicts(results, dict.fromkeys(order, 0), rungs=3, reduction_factor=3)

    assert ours([0, 1, 2, 3]) == ours([3, 2, 1, 0])
    assert {v.status for v in ours([0, 1, 2, 3]).values()} == {"running", "stopped"}
