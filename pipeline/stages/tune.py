"""Stage tune: hyperparameter search; writes the best configurations as presets to <run>/tune/."""

from functools import cached_property

from pipeline.graph import Run, Stage, log
from pipeline.runtime.files import Manifest
from pipeline.runtime.identity import fingerprint
from pipeline.runtime.workers import set_ray_environment
from pipeline.stages.distill import Distill
from pipeline.stages.distill_loop import DistillJob
from pipeline.stages.networks import EVALUATE_VERSION
from pipeline.stages.report import Report
from pipeline.stages.tuning import TUNE_VERSION
from pipeline.stages.tuning.results import summary, write_results
from pipeline.stages.tuning.search import Sampler, build_sampler, check_search, input_values
from pipeline.stages.tuning.trial import SweepJob, input_key


class Tune(Stage):
    """Hyperparameter search, evaluated on images held out of train."""

    name = "tune"

    def check(self) -> None:
        """See Action."""
        super().check()
        check_search(self.run.command)

    @cached_property
    def _sampler(self) -> Sampler:
        return build_sampler(self.config, self.directory)

    @cached_property
    def _inputs(self) -> dict[str, DistillJob]:
        """A job for each distinct set of shards and networks, which are built before the trials."""
        cfg = self.config
        held_out = cfg.source.selection_fraction or cfg.tune.selection_fraction
        inputs = {}
        for values in input_values(cfg.tune, self._sampler):
            shared = {**values, "source.selection_fraction": held_out}
            run = Run(self.run.command.changed(shared))
            inputs[input_key(values)] = run.stage(Distill).job
        return inputs

    def identity(self) -> str:
        """See Stage."""
        cfg, versions = self.config, [TUNE_VERSION, EVALUATE_VERSION]
        jobs = {key: job.checkpoints.name for key, job in self._inputs.items()}
        return fingerprint("tune", versions, cfg.tune, cfg.evaluate.training, jobs)

    def build(self) -> Manifest:
        """See Stage."""
        set_ray_environment()
        from pipeline.stages.tuning.ray_tune import trial_resources, tune  # slow to import

        cfg = self.config
        sweep = SweepJob(
            name=self.run.directory.name, config=cfg, directory=self.directory, inputs=self._inputs
        )
        resources = trial_resources(cfg.tune, use_gpu=self.run.workers(1).use_gpu)
        return tune(sweep, self._sampler, resources, storage=cfg.ray_storage)

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        write_results(self.directory, manifest, self.config.tune, self.run.command)
        log(summary(manifest))
        log(f"[tune] best: python pipeline/run.py --config {self.directory / 'best.toml'}")
        self.run.stage(Report).perform()
