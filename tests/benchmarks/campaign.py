"""Long experiments through the pipeline: which runs, one after the other, and their rows.

    python tests/benchmarks/campaign.py methods --cifar10 DIR --storage DIR
    python tests/benchmarks/campaign.py ingredients --cifar10 DIR --storage DIR
    python tests/benchmarks/campaign.py headline --cifar10 DIR --fashionmnist DIR --storage DIR
    python tests/benchmarks/campaign.py subsets --imagewoof DIR --storage DIR

A run that fails is started again: it resumes from its last checkpoint. A finished one is recorded
(`results.py record`) and skipped the next time, so that the same command goes on after a loss of
the machine, with the loss of one run at most. `--list` only says what would be run.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import results

ROOT = Path(__file__).parents[2]
ATTEMPTS = 5

SHARED = {
    "num_workers": "2",
    "pretrain.networks": "2",
    "pretrain.training.epochs": "8",
    "pretrain.training.lr": "0.02",
    "pretrain.training.cutmix_prob": "0",
    "pretrain.snapshot_every": "1",
    "distill.real_batch": "128",
    "evaluate.protocol": "cosine",
    "evaluate.repeats": "3",
    "evaluate.sets": '["distilled"]',
}
OURS = {"distill.lr": "0.01", "distill.calibration": "30"}
FASHION = {"distill.calibration": "10", "frequencies.sigma": "3"}
"""From a search over calibration 0.5, 5, 30 and sigma 1, 3 on images held out of train."""
METHODS = ("ours", "dance", "tgdd", "ncfm", "dm")
NARROW = {"model.width": "64", "distill.num_steps": "600", "evaluate.training.epochs": "300"}
INGREDIENTS = {
    "pool_20_epochs": {"pretrain.training.epochs": "20", "pretrain.training.schedule": "cosine"},
    "eight_networks": {"pretrain.networks": "8"},
    "steps_1800": {"distill.num_steps": "1800"},
    "calibration_1": {"distill.calibration": "1"},
    "mean_matching": {"distill.objective": "mmd"},
    "snapshots": {"distill.extractor": "snapshot", "distill.calibration_ahead": "[0, 6]"},
    "snapshot_blend": {"distill.extractor": "snapshot_blend"},
    "sigma_3": {"frequencies.sigma": "3"},
    "median_bandwidth": {"frequencies.bandwidth": "median"},
    "psi": {"frequencies.sampler": "psi"},
    "one_network": {"pretrain.networks": "1"},
    "step_schedule": {"evaluate.protocol": "default"},
}
DATA = {
    "cifar10": "CIFAR-10 (JPEG)",
    "fashionmnist": "Fashion-MNIST",
    "imagewoof": "Imagewoof (144 px JPEG)",
}


@dataclass(frozen=True)
class Experiment:
    """One run of the pipeline, and what tables call its data."""

    name: str
    data: str
    preset: str
    options: dict[str, str] = field(default_factory=dict)


def methods(seeds: int) -> Iterator[Experiment]:
    """The methods in one loop: CIFAR-10, width 64, equal steps, one pool a seed."""
    for seed in range(seeds):
        for ipc in (10, 1):
            for method in METHODS:
                own = OURS if method == "ours" else {"method": method}
                sets = {}
                if method == "ours" and seed == 0:
                    sets = {"evaluate.sets": '["distilled", "random", "random_same_factor"]'}
                yield Experiment(
                    f"w64_{method}_ipc{ipc}_s{seed}",
                    "cifar10",
                    f"cifar10_ipc{ipc}",
                    {**SHARED, **NARROW, **own, **sets, "seed": str(seed)},
                )


def ingredients(seeds: int) -> Iterator[Experiment]:
    """One change at a time to `ours` of the methods: CIFAR-10, IPC 10."""
    for seed in range(seeds):
        for name, change in INGREDIENTS.items():
            options = {**SHARED, **NARROW, **OURS, **change, "seed": str(seed)}
            yield Experiment(f"w64_{name}_ipc10_s{seed}", "cifar10", "cifar10_ipc10", options)


def headline(seeds: int) -> Iterator[Experiment]:
    """The best known settings at width 128."""
    for seed in range(seeds):
        for name, steps, epochs in (
            ("cifar10_ipc1", "500", "600"),
            ("cifar10_ipc10", "1500", "600"),
            ("fashionmnist_ipc10", "1000", "400"),
            ("fashionmnist_ipc1", "500", "600"),
        ):
            wide = {"model.width": "128", "distill.num_steps": steps, "seed": str(seed)}
            long = {"evaluate.training.epochs": epochs}
            data = name.partition("_")[0]
            own = FASHION if data == "fashionmnist" else {}
            options = {**SHARED, **OURS, **own, **wide, **long}
            yield Experiment(f"{name}_s{seed}", data, name, options)


def subsets(seeds: int) -> Iterator[Experiment]:
    """ImageNet subsets at 128 px."""
    small = {"model.width": "64", "distill.num_steps": "300", "distill.real_batch": "64"}
    small |= {"evaluate.training.epochs": "500", "pretrain.training.epochs": "6"}
    random = {"evaluate.sets": '["distilled", "random_same_factor"]'}
    for seed in range(seeds):
        options = {**SHARED, **OURS, **small, "seed": str(seed)}
        sets = {} if seed else random
        yield Experiment(
            f"imagewoof_ipc1_w64_s{seed}", "imagewoof", "imagewoof_ipc1", options | sets
        )


CAMPAIGNS = {
    "methods": methods,
    "ingredients": ingredients,
    "headline": headline,
    "subsets": subsets,
}


def run(experiment: Experiment, source: Path, storage: Path) -> None:
    """Run it to its end, and record its rows. Raises RuntimeError if it fails time and again."""
    preset = f"pipeline/presets/{experiment.preset}.toml"
    options = {**experiment.options, "source.kind": "folder", "source.path": str(source)}
    options |= {"name": experiment.name, "storage_path": str(storage)}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, "pipeline/run.py", "--config", preset, *words]
    for attempt in range(ATTEMPTS):
        print(f"[campaign] {experiment.name}, attempt {attempt + 1}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode == 0:
            break
    else:
        raise RuntimeError(f"{experiment.name} failed {ATTEMPTS} times: {' '.join(command)}")


def record(experiment: Experiment, storage: Path) -> None:
    """Keep the rows of a finished run."""
    machine = f"{os.cpu_count()} cores, {results.processor()}"
    preset = experiment.preset if experiment.data + "_" in experiment.name else ""
    results.record([storage / experiment.name], DATA[experiment.data], preset, machine)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaign", choices=tuple(CAMPAIGNS))
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="say what would be run")
    for data in DATA:
        parser.add_argument(f"--{data}", type=Path, help="the data's directory")
    arguments = parser.parse_args()
    plan = CAMPAIGNS[arguments.campaign](arguments.seeds)
    for experiment in plan:
        source = getattr(arguments, experiment.data)
        done = (arguments.storage / experiment.name / "report.html").exists()
        if arguments.list or source is None:
            why = "done" if done else "no directory given" if source is None else "to be run"
            print(f"[campaign] {experiment.name}: {why}", flush=True)
            continue
        if not done:
            run(experiment, source.absolute(), arguments.storage.absolute())
        record(experiment, arguments.storage)


if __name__ == "__main__":
    main()
