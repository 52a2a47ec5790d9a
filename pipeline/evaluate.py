"""Stage evaluate: fresh networks trained on each set, as parallel Ray tasks, and tested on the val
split.

One task is one network. Its result is a small file in the cache, so that a rerun with more repeats,
or another run that needs the same baseline, trains only what nobody has trained yet.
"""

import copy
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from upath import UPath

from ncfm import load
from ncfm.baselines import herding_set, random_set
from ncfm.curation import CurateConfig, ViewLabels, view_label_bytes
from ncfm.curation import curate as add_soft_labels
from ncfm.evaluate import confidence_interval, ranking_measures, train_and_test
from ncfm.images import ImageSource, Relabelled
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_seed
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig
from pipeline.curate import pool_networks
from pipeline.data.batches import ClassBatches, StoredImages
from pipeline.data.store import Store
from pipeline.pretrain import load_member, new_network
from pipeline.progress import Progress
from pipeline.stage import Manifest, fingerprint, peak_rss_bytes, read_json, write_atomic
from pipeline.workers import Workers

SetName = Literal[
    "distilled",
    "distilled_soft",
    "distilled_soft_views",
    "random",
    "random_soft",
    "random_soft_views",
    "random_same_factor",
    "herding",
    "whole",
]

EVALUATE_VERSION = 2
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""
MOST_THREADS = 4  # of a network: batches of 128 are trained in four parts
CONFUSION_CLASSES = 100  # with more classes a row keeps their accuracies alone


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """One fresh network on one set, or on some of its classes."""

    set: SetName
    repeat: int
    identity: str  # fingerprint of the set's content
    store: Store
    distilled: UPath  # with soft labels for the set distilled_soft
    pool: UPath
    pool_model: ModelConfig
    networks: int
    curate: CurateConfig
    model: ModelConfig
    training: TrainConfig
    hard_epochs: int  # of sets with soft labels: so many last epochs learn from the hard ones
    legacy_every: int = 0
    classes: tuple[int, ...] | None = None  # learned and tested on these, as 0, 1, ...; None: all
    ipc: int
    factor: int
    seed: int

    @property
    def is_soft(self) -> bool:
        """Whether the network learns from soft labels."""
        return self.set in ("distilled_soft", "random_soft")

    @property
    def is_relabelled(self) -> bool:
        """Whether teachers label every augmented view."""
        return self.set in ("distilled_soft_views", "random_soft_views")

    def label_bytes(self) -> int:
        """What the labels take to store, beyond a number of each image's class."""
        classes = self.store.spec.num_classes
        images = classes * self.ipc * (self.factor**2 if self.set.startswith("distilled") else 1)
        if self.is_relabelled:
            epochs = self.training.epochs - self.hard_epochs
            return view_label_bytes(epochs=epochs, images=images, classes=classes)
        return 4 * images * classes if self.is_soft else 0

    def result_path(self, cache: UPath) -> UPath:
        """Where the result of exactly this network is kept."""
        parts: list[object] = [EVALUATE_VERSION, self.set, self.repeat, self.identity]
        parts += [self.model, self.training, self.seed]
        if self.is_soft or self.is_relabelled:
            parts.append(self.hard_epochs)
        if self.legacy_every:
            parts.append(f"legacy {self.legacy_every}")
        if self.classes is not None:
            parts.append(list(self.classes))
        return cache / f"{fingerprint(*parts)}.json"

    def training_set(self, device: str) -> ImageSource:
        """The images that the network learns from, labels as in the whole set."""
        spec = self.store.spec
        classes = self.classes or tuple(range(spec.num_classes))
        if self.set == "whole":
            return StoredImages(self.store, "train", classes)
        if self.set in ("distilled", "distilled_soft", "distilled_soft_views"):
            made = load(self.distilled).of_classes(classes)
        elif self.set == "herding":
            made = self._herding(classes, device)
        else:
            made = self.random_images(classes)
        if self.set == "random_soft":
            count = min(self.curate.networks, self.networks)
            teachers = pool_networks(self.pool, count, self.pool_model, spec)
            made = add_soft_labels(made, teachers, self.curate, device=device)
        return made.source(soft=self.is_soft, device=device)

    def random_images(self, classes: Sequence[int]) -> SyntheticSet:
        """Random real images, stored as the synthetic ones are. Another draw in every repeat: the
        spread of the baseline is that of its choice, too.
        """
        factor = self.factor if self.set == "random_same_factor" else 1
        real = ClassBatches(self.store, classes, self.seed)
        purpose = "random" if self.set in ("random_soft", "random_soft_views") else self.set
        images = [
            random_set(
                real.batch(c, self.repeat, self.ipc * factor**2, purpose=purpose),
                self.ipc,
                seed=self.seed,
                class_index=c,
                factor=factor,
            )
            for c in classes
        ]
        labels = torch.tensor(classes).repeat_interleave(self.ipc)
        return SyntheticSet(torch.cat(images), labels, factor, self.store.spec)

    def _herding(self, classes: Sequence[int], device: str) -> SyntheticSet:
        """Real images that herding chooses; each repeat by the features of another network."""
        spec = self.store.spec
        network = new_network(self.pool_model, spec, seed=0)  # its weights are the pool's
        _, trained = load_member(self.pool, self.repeat % self.networks)
        network.load_state_dict(trained)
        chosen = [
            herding_set(
                StoredImages(self.store, "train", [c]),
                self.ipc,
                network,
                spec,
                device=device,
            )
            for c in classes
        ]
        labels = torch.tensor(classes).repeat_interleave(self.ipc)
        return SyntheticSet(torch.cat(chosen), labels, 1, spec)

    def _view_labels(self, device: str) -> ViewLabels:
        count = min(self.curate.networks, self.networks)
        teachers = pool_networks(self.pool, count, self.pool_model, self.store.spec)
        return ViewLabels([copy.deepcopy(each) for each in teachers], self.curate, device=device)

    def run(self, threads: int = 1, device: str = "cpu") -> dict[str, Any]:
        """Train and test; runs inside a Ray task. The threads make no difference to the result."""
        torch.set_num_threads(1)  # of an operation: parts of a batch are what threads share
        spec, train_on = self.store.spec, self.training_set(device)
        test_on: ImageSource = StoredImages(self.store, "val", self.classes)
        if self.classes is not None:
            spec = dataclasses.replace(
                spec, class_names=tuple(spec.class_names[c] for c in self.classes)
            )
            train_on, test_on = (Relabelled(s, self.classes) for s in (train_on, test_on))
        hard = _HARD.get(self.set)
        tail = dataclasses.replace(self, set=hard) if hard else None
        judged = train_and_test(
            train_on,
            test_on,
            spec,
            model=self.model,
            training=self.training,
            seed=keyed_seed(self.seed, "evaluate", self.repeat),
            device=device,
            tail=tail.training_set(device) if tail else None,
            tail_epochs=self.hard_epochs,
            test_every=self.legacy_every,
            threads=threads,
            relabel=self._view_labels(device) if self.is_relabelled else None,
        )
        return {
            "accuracy": judged.accuracy,
            "peak_rss_bytes": peak_rss_bytes(),
            "per_class": _per_class(judged.confusion),
            "confusion": judged.confusion.tolist()
            if spec.num_classes <= CONFUSION_CLASSES
            else None,
            "legacy": judged.best_test_accuracy,
        }


_HARD: dict[SetName, SetName] = {
    "distilled_soft": "distilled",
    "distilled_soft_views": "distilled",
    "random_soft": "random",
    "random_soft_views": "random",
}


def _per_class(confusion: Tensor) -> list[float]:
    """Accuracy of each class; 0 for one without test images."""
    counts = confusion.sum(1).clamp_min(1)
    found: list[float] = (confusion.diagonal() / counts).tolist()
    return found


def evaluate(tasks: Sequence[EvaluationTask], cache: UPath, workers: Workers) -> Manifest:
    """Run the tasks that have no result yet; returns {"rows": [...], "measures": [...]}, one row
    for each set and network, in the order of the tasks.
    """
    results = run_tasks(tasks, cache, workers, stage="evaluate")
    groups: dict[tuple[str, str], list[tuple[EvaluationTask, dict[str, Any]]]] = {}
    for task, result in zip(tasks, results, strict=True):
        groups.setdefault((task.set, task.model.name), []).append((task, result))
    rows = [_row([task for task, _ in g], [result for _, result in g]) for g in groups.values()]
    return {
        "rows": rows,
        "measures": measures(rows),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
    }


def run_tasks(
    tasks: Sequence[EvaluationTask], cache: UPath, workers: Workers, *, stage: str
) -> list[dict[str, Any]]:
    """The results of the tasks, in their order: from the cache, or else by Ray tasks, as many at a
    time as there are workers. A result is the same whatever runs beside it.
    """
    import ray

    cache.mkdir(parents=True, exist_ok=True)
    paths = [task.result_path(cache) for task in tasks]
    waiting = {
        path: task for path, task in zip(paths, tasks, strict=True) if not path.exists()
    }  # each once, though two rows may need it
    remote = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0, max_retries=3)(
        EvaluationTask.run
    )
    threads = [1] * len(waiting)
    if not workers.use_gpu:
        nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
        threads = shares(len(waiting), workers.count, largest=min(MOST_THREADS, int(max(nodes))))
    pending: dict[Any, tuple[UPath, int]] = {}
    progress, total, todo = Progress(stage, len(waiting), unit="networks"), len(waiting), [*waiting]
    free = workers.count
    while todo or pending:
        while todo and threads[0] <= free:
            path, mine = todo.pop(0), threads.pop(0)
            task = remote.options(num_cpus=mine).remote(waiting[path], mine, workers.device)
            pending[task], free = (path, mine), free - mine
        ready, _ = ray.wait(list(pending))
        path, mine = pending.pop(ready[0])
        free += mine
        result = ray.get(ready[0])
        write_atomic(path, json.dumps(result))
        progress.update(total - len(todo) - len(pending), **{waiting[path].set: result["accuracy"]})
    return [read_json(path) for path in paths]


def shares(networks: int, cores: int, *, largest: int | None = None) -> list[int]:
    """Threads of each of some networks, in their order, so that no core waits for the last of them:
    those that do not fill all cores come first and share them; then one a core. `largest`: the most
    that one can use.
    """
    odd = networks % cores
    each = min(cores // odd, largest or cores) if odd else 1
    return [each] * odd + [1] * (networks - odd)


def _row(tasks: Sequence[EvaluationTask], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of evaluation.json."""
    task, values = tasks[0], [result["accuracy"] for result in results]
    row: dict[str, Any] = {
        "set": task.set,
        "network": task.model.name,
        "images_per_class": task.ipc,
        "accuracy": values,
        "mean": statistics.fmean(values),
        "std": _std(values),
        "epochs": task.training.epochs,
        "ci95": confidence_interval(values),
        "per_class": torch.tensor([r["per_class"] for r in results]).double().mean(0).tolist(),
    }
    if task.is_soft or task.is_relabelled:
        row["label_bytes"] = task.label_bytes()
    if all(result["confusion"] is not None for result in results):
        row["confusion"] = torch.tensor([r["confusion"] for r in results]).sum(0).tolist()
    if task.legacy_every:
        legacy = [result["legacy"] for result in results]
        row |= {
            "legacy": legacy,
            "legacy_mean": statistics.fmean(legacy),
            "legacy_std": _std(legacy),
        }
    return row


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """DD-Ranking's measures, for every network whose rows they need are there: {"set", "network",
    and the fields of RankingMeasures}.
    """
    found = []
    for network in dict.fromkeys(row["network"] for row in rows):
        mean = {row["set"]: row["mean"] for row in rows if row["network"] == network}
        for used, random in (
            ("distilled", "random"),
            ("distilled_soft", "random_soft"),
            ("distilled_soft_views", "random_soft_views"),
        ):
            if {"whole", "distilled", used, random} <= mean.keys():
                values = ranking_measures(
                    whole=mean["whole"],
                    hard=mean["distilled"],
                    as_used=mean[used],
                    random=mean[random],
                )
                found.append({"set": used, "network": network, **dataclasses.asdict(values)})
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, accuracies in percent."""
    legacy = any("legacy" in row for row in rows)
    header = ["set", "network", "images/class", "epochs", "accuracy %", "95 % interval", "runs"]
    lines = [[*header, *(["legacy (best on test) %"] if legacy else [])]]
    for row in rows:
        mean, half = 100 * row["mean"], row.get("ci95")
        lines.append(
            [
                row["set"],
                row["network"],
                str(row["images_per_class"]),
                str(row["epochs"]),
                f"{mean:.1f} +- {100 * row['std']:.1f}",
                ""
                if half is None
                else f"{max(0, mean - 100 * half):.1f} to {min(100, mean + 100 * half):.1f}",
                str(len(row["accuracy"])),
            ]
        )
        if legacy and "legacy" in row:
            best = f"{100 * row['legacy_mean']:.1f} +- {100 * row['legacy_std']:.1f}"
            lines[-1].append(best)
        elif legacy:
            lines[-1].append("")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
