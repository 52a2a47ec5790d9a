"""Search trial: one-process distillation, evaluated at rungs on held-out training images.

Its directory holds its checkpoints and the result of every rung. A restarted trial resumes from
there: finished rungs are reported from their files.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from upath import UPath

from ncfm.allocation import shared_or_each
from ncfm.distill import NonFiniteLossError
from ncfm.evaluate import train_and_test
from ncfm.models import ModelConfig
from ncfm.seeding import keyed_seed
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig
from pipeline.data.batches import StoredImages
from pipeline.observe.progress import Progress, append_rows, read_rows
from pipeline.observe.tracking import TrackedRun, Trackers
from pipeline.runtime.checkpoint import load_checkpoint
from pipeline.runtime.files import read_json, write_atomic
from pipeline.runtime.identity import canonical_json, fingerprint, peak_rss_bytes
from pipeline.stages.distill_loop import DistillJob, Loop
from pipeline.stages.networks import EVALUATE_VERSION
from pipeline.stages.tuning import TUNE_VERSION
from pipeline.stages.tuning.search_space import INPUTS, Values, override

if TYPE_CHECKING:
    from pipeline.config import RunConfig

Result = dict[str, Any]
"""Result of a rung: step, accuracy (the mean), accuracies, seconds, peak_rss_bytes."""
PROGRESS_S = 60.0


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """Inputs of a trial."""

    number: int
    directory: UPath
    distill: DistillJob
    rungs: tuple[int, ...]  # steps
    model: ModelConfig  # of the networks that are trained on the set
    training: TrainConfig
    repeats: int

    @property
    def stored_bytes(self) -> int:
        """Size of the synthetic set, at one byte per stored pixel and channel."""
        spec = self.distill.store.spec
        return sum(self.distill.ipc) * spec.channels * spec.image_size**2

    def results(self) -> list[Result]:
        """Results of the finished rungs."""
        results: list[Result] = []
        while len(results) < len(self.rungs) and (result := read_json(self._path(len(results)))):
            results.append(result)
        return results

    def _path(self, rung: int) -> UPath:
        return self.directory / f"rung-{rung}.json"

    def run(self, report: Callable[[Result], None], device: str) -> None:
        """Distil and evaluate, rung by rung. Propagates errors of distillation and training."""
        self.directory.mkdir(parents=True, exist_ok=True)
        done = self.results()
        for result in done:
            report(result)
        progress = Progress(
            f"trial {self.number}", self.rungs[-1], unit="steps", interval=PROGRESS_S
        )
        for rung in range(len(done), len(self.rungs)):
            began = time.monotonic()
            steps = self.rungs[rung]
            Loop(self.distill, device).run(progress, until=steps)
            accuracies = self._accuracies(steps, device)
            result = {
                "step": steps,
                "accuracy": statistics.fmean(accuracies),
                "accuracies": accuracies,
                "seconds": round(time.monotonic() - began, 3),
                "peak_rss_bytes": peak_rss_bytes(),
            }
            self._tell(result)
            write_atomic(self._path(rung), json.dumps(result))
            report(result)

    def _accuracies(self, steps: int, device: str) -> list[float]:
        """Accuracies on split `select` of fresh networks trained on the set at this step."""
        job = self.distill
        state = load_checkpoint(job.checkpoints, at_most=steps)
        if state is None or int(state["step"]) != steps:
            raise RuntimeError(f"no checkpoint of step {steps} in {job.checkpoints}")
        spec = job.store.spec
        classes = range(spec.num_classes)
        images = torch.cat([state[f"class/{c}/images"].float() for c in classes])
        labels = torch.tensor(classes).repeat_interleave(torch.tensor(job.ipc))
        synthetic = SyntheticSet(images, labels, job.synthetic.factor, spec)
        held_out = StoredImages(job.store, "select")
        return [
            train_and_test(
                synthetic.source(device=device),
                held_out,
                spec,
                model=self.model,
                training=self.training,
                seed=keyed_seed(job.seed, "tune", repeat),
                device=device,
            ).accuracy
            for repeat in range(self.repeats)
        ]

    def _tell(self, result: Result) -> None:
        row = {"stage": "tune", "step": result["step"], "time": time.time()}
        row["tune/accuracy"] = result["accuracy"]
        rows = [
            old
            for old in read_rows(self.distill.metrics)
            if old["stage"] != "tune"
            or old["step"] < result["step"]  # written before an interruption
        ]
        append_rows(self.distill.metrics, [*rows, row], fresh=True)
        trackers = Trackers(self.distill.tracked, result["step"])
        trackers.log(row)
        trackers.close()


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """State shared by the trials of a search; sent to their workers once."""

    name: str  # of the run
    config: "RunConfig"
    directory: UPath
    inputs: Mapping[str, DistillJob]  # input_key -> a job on its shards and networks

    def trial(self, number: int, values: Values) -> TrialJob:
        """The trial with these values. Raises ValueError if they are not a valid configuration."""
        config: RunConfig = override(self.config, values)
        rungs = config.tune.steps(config.distill.num_steps)
        training = replace(config.evaluate.training, epochs=config.tune.epochs)
        base = self.inputs[input_key(values)]
        ipc = config.stored(base.store.counts("train"))
        identity = fingerprint(
            "trial",
            [TUNE_VERSION, EVALUATE_VERSION],
            base.checkpoints.name,  # shards, networks, seed, the version of the distillation
            *(config.synthetic, config.distill, config.frequencies, config.augment),
            *(shared_or_each(ipc), rungs, training, config.model, config.tune.repeats),
        )
        directory = self.directory / "trials" / f"{number:03d}-{identity}"
        tracked = base.tracked
        if tracked is not None:
            tracked = TrackedRun(
                config=tracked.config,
                name=f"{self.name}-trial-{number:03d}",
                identity=identity,
                tensorboard=tracked.tensorboard.parent / f"trial-{number:03d}-{identity}",
                directory=tracked.directory,
                options=values,
            )
        job = replace(
            base,
            synthetic=config.synthetic,
            distill=config.distill,
            frequencies=config.frequencies,
            augment=config.augment,
            ipc=ipc,
            checkpoints=directory / "checkpoints",
            metrics=directory / "metrics.jsonl",
            tracked=tracked,
        )
        return TrialJob(
            number=number,
            directory=directory,
            distill=job,
            rungs=rungs,
            model=config.model,
            training=training,
            repeats=config.tune.repeats,
        )


def input_key(values: Mapping[str, object]) -> str:
    """Key of the values that change shards or networks."""
    return canonical_json({k: v for k, v in values.items() if k.partition(".")[0] in INPUTS})


def run_trial(config: dict[str, Any], *, sweep: SweepJob, device: str) -> None:
    """Ray Tune's trainable function: run one trial on a worker.

    Failures that a retry would repeat (a non-finite loss) are reported as results, not raised.
    """
    from ray import tune

    number, values = config["number"], json.loads(config["values"])
    try:
        trial = sweep.trial(number, values)
        trial.run(lambda result: tune.report({"number": number, **result}), device)
    except (NonFiniteLossError, FloatingPointError) as error:
        tune.report({"number": number, "failure": str(error)})
