"""Stage evaluate: fresh networks trained on each set, as parallel Ray tasks, and tested on the val
split.

One task is one network. Its result is a small file in the cache, so that a rerun with more repeats,
or another run that needs the same baseline, trains only what nobody has trained yet.
"""

import json
import statistics
from dataclasses import dataclass
from typing import Any, Literal

import torch
from upath import UPath

from ncfm import load
from ncfm.baselines import herding_set, random_set
from ncfm.evaluate import evaluate_once
from ncfm.images import ImageSource, InMemoryImages
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_seed
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig
from pipeline.pretrain import load_member, new_network
from pipeline.progress import Progress
from pipeline.stage import Manifest, fingerprint, peak_rss_bytes, read_json, write_atomic
from pipeline.stream import ClassStreams, ShardSet, StreamedImages
from pipeline.workers import Workers

SetName = Literal["distilled", "distilled_soft", "random", "random_same_factor", "herding", "whole"]


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """One fresh network on one set."""

    set: SetName
    repeat: int
    identity: str  # fingerprint of the set's content
    shards: UPath
    shard_manifest: Manifest
    distilled: UPath  # with soft labels for the set distilled_soft
    pool: UPath
    networks: int
    model: ModelConfig
    training: TrainConfig
    hard_epochs: int  # of distilled_soft: so many last epochs learn from its hard labels
    ipc: int
    factor: int
    memory_budget: int
    seed: int

    def result_path(self, cache: UPath) -> UPath:
        """Where the accuracy of exactly this network is kept."""
        parts = [self.set, self.repeat, self.identity, self.model, self.training, self.seed]
        key = fingerprint(*parts, *([self.hard_epochs] if self.set == "distilled_soft" else []))
        return cache / f"{key}.json"

    def training_set(self, shards: ShardSet) -> ImageSource:
        """The images that the network learns from."""
        if self.set == "whole":
            return StreamedImages(shards, "train", self.memory_budget)
        if self.set in ("distilled", "distilled_soft"):
            synthetic = load(self.distilled)
            decoded, labels = synthetic.decode()
            soft = synthetic.soft_labels if self.set == "distilled_soft" else None
            return InMemoryImages(decoded, labels if soft is None else soft)
        classes = range(shards.spec.num_classes)
        if self.set == "herding":
            return self._herding(shards, classes)
        factor = 1 if self.set == "random" else self.factor
        # Another draw of real images in every repeat: the spread of the baseline is that of its
        # choice, too.
        streams = ClassStreams(shards, classes, self.memory_budget, self.seed)
        needed = self.ipc * factor**2
        images = [
            random_set(
                streams.batch(c, self.repeat, needed, purpose=self.set),
                self.ipc,
                seed=self.seed,
                class_index=c,
                factor=factor,
            )
            for c in classes
        ]
        labels = torch.arange(len(images)).repeat_interleave(self.ipc)
        return InMemoryImages(
            *SyntheticSet(torch.cat(images), labels, factor, shards.spec).decode()
        )

    def _herding(self, shards: ShardSet, classes: range) -> ImageSource:
        """Real images that herding chooses; each repeat by the features of another network."""
        network = new_network(self.model, shards.spec, seed=0)  # its weights are the pool's
        _, trained = load_member(self.pool, self.repeat % self.networks)
        network.load_state_dict(trained)
        chosen = [
            herding_set(
                StreamedImages(shards, "train", self.memory_budget, classes=[c]),
                self.ipc,
                network,
                shards.spec,
                device=_device(),
            )
            for c in classes
        ]
        return InMemoryImages(torch.cat(chosen), torch.tensor(classes).repeat_interleave(self.ipc))

    def run(self) -> dict[str, Any]:
        """Train and test; runs inside a Ray task."""
        shards = ShardSet(self.shards, self.shard_manifest)
        soft = self.set == "distilled_soft"
        value = evaluate_once(
            self.training_set(shards),
            StreamedImages(shards, "val", self.memory_budget),
            shards.spec,
            model=self.model,
            training=self.training,
            seed=keyed_seed(self.seed, "evaluate", self.repeat),
            device=_device(),
            tail=InMemoryImages(*load(self.distilled).decode()) if soft else None,
            tail_epochs=self.hard_epochs,
        )
        return {"accuracy": value, "peak_rss_bytes": peak_rss_bytes()}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(tasks: list[EvaluationTask], cache: UPath, workers: Workers) -> Manifest:
    """Run the tasks that have no result yet; returns {"rows": [...]}, one row a set, in the order
    of the tasks.
    """
    import ray

    cache.mkdir(parents=True, exist_ok=True)
    missing = [task for task in tasks if not task.result_path(cache).exists()]
    remote = ray.remote(num_cpus=1, num_gpus=1 if workers.use_gpu else 0, max_retries=3)(
        EvaluationTask.run
    )
    pending = {remote.remote(task): task for task in missing}
    progress = Progress("evaluate", len(pending), unit="networks")
    while pending:
        ready, _ = ray.wait(list(pending))
        task = pending.pop(ready[0])
        result = ray.get(ready[0])
        write_atomic(task.result_path(cache), json.dumps(result))
        progress.update(len(missing) - len(pending), **{task.set: result["accuracy"]})
    results = [(task, read_json(task.result_path(cache))) for task in tasks]
    rows = []
    for name in dict.fromkeys(task.set for task in tasks):
        mine = [(task, result["accuracy"]) for task, result in results if task.set == name]
        task, values = mine[0][0], [value for _, value in mine]
        rows.append(
            {
                "set": name,
                "network": task.model.name,
                "images_per_class": task.ipc,
                "accuracy": values,
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "epochs": task.training.epochs,
            }
        )
    return {"rows": rows, "peak_rss_bytes": max(result["peak_rss_bytes"] for _, result in results)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, accuracies in percent."""
    lines = [("set", "network", "images/class", "epochs", "accuracy %", "runs")]
    for row in rows:
        value = f"{100 * row['mean']:.1f} +- {100 * row['std']:.1f}"
        numbers = (
            str(row["images_per_class"]),
            str(row["epochs"]),
            value,
            str(len(row["accuracy"])),
        )
        lines.append((row["set"], row["network"], *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
