"""Train fresh networks on image sets and test them on the val split, as parallel Ray tasks.

One task per network. Results are small files in the cache: a rerun with more repeats, or another
run with the same baseline, trains only the missing networks.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from upath import UPath

from ncfm import load
from ncfm.baselines import herding_set, random_set
from ncfm.curation import CurateConfig, ViewLabels, view_label_bytes
from ncfm.curation import curate as add_soft_labels
from ncfm.evaluate import train_and_test
from ncfm.images import ImageSource, Relabelled
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_seed
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig
from pipeline.data.batches import ClassBatches, StoredImages
from pipeline.data.pool import Pool
from pipeline.data.store import Store
from pipeline.observe.progress import NETWORK_PROGRESS_S, Progress
from pipeline.runtime.files import read_json, write_atomic
from pipeline.runtime.identity import fingerprint, peak_rss_bytes
from pipeline.runtime.tasks import run_each
from pipeline.runtime.workers import Workers

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
"""Raise when this stage's results change; see tests/integration/test_golden.py."""
MAX_RETRIES = 3
"""Retries of a network whose worker died."""
CONFUSION_CLASSES = 100  # with more classes, only per-class accuracies are kept
CACHED_BEST = "legacy"
"""Key of the best test accuracy in cached results: its former name, so that they stay valid."""


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """One fresh network on one set, or on some of its classes."""

    set: SetName
    repeat: int
    identity: str  # fingerprint of the set's content
    store: Store
    distilled: UPath  # with soft labels for the set distilled_soft
    pool: Pool
    curate: CurateConfig
    model: ModelConfig
    training: TrainConfig
    hard_epochs: int  # final epochs on hard labels, for sets with soft labels
    best_on_test_every: int = 0
    classes: tuple[int, ...] | None = (
        None  # train and test on these, relabelled 0, 1, ...; None: all
    )
    ipc: tuple[int, ...]  # images of each class
    factor: int
    seed: int

    @property
    def is_soft(self) -> bool:
        """Whether the network learns from stored soft labels."""
        return self.set in ("distilled_soft", "random_soft")

    @property
    def is_relabelled(self) -> bool:
        """Whether teachers label every augmented view."""
        return self.set in ("distilled_soft_views", "random_soft_views")

    def label_bytes(self) -> int:
        """Storage of the labels in bytes, beyond one class index per image."""
        classes = self.store.spec.num_classes
        images = sum(self.ipc) * (self.factor**2 if self.set.startswith("distilled") else 1)
        if self.is_relabelled:
            epochs = self.training.epochs - self.hard_epochs
            return view_label_bytes(epochs=epochs, images=images, classes=classes)
        return 4 * images * classes if self.is_soft else 0

    def result_path(self, cache: UPath) -> UPath:
        """Path of this network's cached result."""
        parts: list[object] = [EVALUATE_VERSION, self.set, self.repeat, self.identity]
        parts += [self.model, self.training, self.seed]
        if self.is_soft or self.is_relabelled:
            parts.append(self.hard_epochs)
        if self.best_on_test_every:
            parts.append(f"legacy {self.best_on_test_every}")  # the option's former name
        if self.classes is not None:
            parts.append(list(self.classes))
        return cache / f"{fingerprint(*parts)}.json"

    def training_set(self, device: str) -> ImageSource:
        """The training images; labels are those of the whole set, not yet relabelled."""
        spec = self.store.spec
        classes = self.classes or tuple(range(spec.num_classes))
        if self.set == "whole":
            return StoredImages(self.store, "train", classes)
        if self.set in ("distilled", "distilled_soft", "distilled_soft_views"):
            images = load(self.distilled).of_classes(classes)
        elif self.set == "herding":
            images = self._herding(classes, device)
        else:
            images = self.random_images(classes)
        if self.set == "random_soft":
            teachers = self.pool.teachers(self.curate.networks, spec)
            images = add_soft_labels(images, teachers, self.curate, device=device)
        return images.source(soft=self.is_soft, device=device)

    def random_images(self, classes: Sequence[int]) -> SyntheticSet:
        """Random real images, stored like the synthetic ones. Each repeat draws anew, so that the
        baseline's spread includes the draw.
        """
        factor = self.factor if self.set == "random_same_factor" else 1
        real = ClassBatches(self.store, classes, self.seed)
        purpose = "random" if self.set in ("random_soft", "random_soft_views") else self.set
        images = [
            random_set(
                real.batch(c, self.repeat, self.ipc[c] * factor**2, purpose=purpose),
                self.ipc[c],
                seed=self.seed,
                class_index=c,
                factor=factor,
            )
            for c in classes
        ]
        return self._real_set(classes, images, factor)

    def _herding(self, classes: Sequence[int], device: str) -> SyntheticSet:
        """Real images chosen by herding; each repeat uses the features of another pool network."""
        spec = self.store.spec
        network = self.pool.trained(self.repeat % self.pool.networks, spec)
        chosen = [
            herding_set(
                StoredImages(self.store, "train", [c]),
                self.ipc[c],
                network,
                spec,
                device=device,
            )
            for c in classes
        ]
        return self._real_set(classes, chosen, 1)

    def _real_set(
        self, classes: Sequence[int], images: Sequence[Tensor], factor: int
    ) -> SyntheticSet:
        labels = torch.tensor(classes).repeat_interleave(torch.tensor([len(p) for p in images]))
        return SyntheticSet(torch.cat(list(images)), labels, factor, self.store.spec)

    def _view_labels(self, device: str) -> ViewLabels:
        teachers = self.pool.teachers(self.curate.networks, self.store.spec)
        return ViewLabels(list(teachers), self.curate, device=device)

    def run(self, threads: int = 1, device: str = "cpu") -> dict[str, Any]:
        """Train and test, inside a Ray task. The result does not depend on `threads`."""
        torch.set_num_threads(1)  # per operation: threads share a batch instead
        spec, train_on = self.store.spec, self.training_set(device)
        test_on: ImageSource = StoredImages(self.store, "val", self.classes)
        if self.classes is not None:
            spec = dataclasses.replace(
                spec, class_names=tuple(spec.class_names[c] for c in self.classes)
            )
            train_on, test_on = (Relabelled(s, self.classes) for s in (train_on, test_on))
        hard = _HARD.get(self.set)
        tail = dataclasses.replace(self, set=hard) if hard else None
        name, epochs = f"{self.set}, network {self.repeat}", self.training.epochs
        progress = Progress(name, epochs, unit="epochs", interval=NETWORK_PROGRESS_S, quiet=True)
        result = train_and_test(
            train_on,
            test_on,
            spec,
            model=self.model,
            training=self.training,
            seed=keyed_seed(self.seed, "evaluate", self.repeat),
            device=device,
            tail=tail.training_set(device) if tail else None,
            tail_epochs=self.hard_epochs,
            test_every=self.best_on_test_every,
            threads=threads,
            relabel=self._view_labels(device) if self.is_relabelled else None,
            on_batch=lambda epochs: progress.update(round(epochs, 1)),
        )
        return {
            "accuracy": result.accuracy,
            "peak_rss_bytes": peak_rss_bytes(),
            "per_class": _per_class(result.confusion),
            "confusion": result.confusion.tolist()
            if spec.num_classes <= CONFUSION_CLASSES
            else None,
            CACHED_BEST: result.best_test_accuracy,
        }


_HARD: dict[SetName, SetName] = {
    "distilled_soft": "distilled",
    "distilled_soft_views": "distilled",
    "random_soft": "random",
    "random_soft_views": "random",
}


def _per_class(confusion: Tensor) -> list[float]:
    """Accuracy of each class; 0 for a class without test images."""
    counts = confusion.sum(1).clamp_min(1)
    accuracies: list[float] = (confusion.diagonal() / counts).tolist()
    return accuracies


def run_tasks(
    tasks: Sequence[EvaluationTask], cache: UPath, workers: Workers, *, stage: str
) -> list[dict[str, Any]]:
    """Results of the tasks, in order: from the cache, else by Ray tasks, as many at a time as there
    are workers. A result does not depend on what runs beside it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = [task.result_path(cache) for task in tasks]
    waiting = {
        path: task for path, task in zip(paths, tasks, strict=True) if not path.exists()
    }  # each once, even if two rows need it
    progress = Progress(stage, len(waiting), unit="networks")
    results = run_each(EvaluationTask.run, waiting, workers, max_retries=MAX_RETRIES)
    for done, (path, result) in enumerate(results, start=1):
        write_atomic(path, json.dumps(result))
        progress.update(done, **{waiting[path].set: result["accuracy"]})
    return [read_json(path) for path in paths]
