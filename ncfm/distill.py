"""The minmax step: psi ascends the discrepancy, the synthetic images descend it.

A `Distiller` owns the synthetic images of some classes (all of them, or one worker's share) and
updates each exactly once a step. What it does at a step depends on (seed, step, class) alone. It
knows no Ray: a `Communicator` joins it to the others. Workers that share the same classes form a
group: each extracts its part of the real batch, the sums over the parts are added up, and all make
the same update of the same images. So only sums and psi's gradient cross the network, never images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.augment import Augment, AugmentConfig
from ncfm.backend.features import FeatureExtractor
from ncfm.communication import Communicator, SingleProcess, own_parts
from ncfm.distill_config import DistillConfig
from ncfm.extractors import Blend, ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.image_optimizer import ImageOptimizer
from ncfm.images import ImageSpec, to_device
from ncfm.objectives import OBJECTIVES, Comparison
from ncfm.psi import Frequencies, HeldOut, PsiGradient
from ncfm.registry import lookup
from ncfm.seeding import keyed_generator
from ncfm.views import SiameseViews

__all__ = ["DistillConfig", "Distiller", "NonFiniteLossError"]


class NonFiniteLossError(RuntimeError):
    """The loss of some classes, or its gradient, is NaN or infinite at a step; the message names
    both.
    """

    def __init__(self, step: int, classes: list[int]) -> None:
        super().__init__(step, classes)
        self.step, self.classes = step, classes

    def __str__(self) -> str:
        return f"step {self.step}: the loss of class {self.classes}, or its gradient, is not finite"


@dataclass(frozen=True)
class _Step:
    """What the minmax updates of one step have in common."""

    real_features: Callable[[slice], list[Tensor]]
    """Features of the real images of a part of the classes."""
    held_out: list[Tensor]
    """Those of the images held out for psi; empty if it learns from the matched ones."""
    views: SiameseViews
    classifier: Blend


class Distiller:
    """Synthetic images of some classes, their optimiser, psi, and the step that updates them.

    Args:
        images: class index -> stored images (ipc, C, H, W) in [0, 1]; this worker's classes.
        num_classes: classes of the whole run, over all workers.
        pool: extractors; the step draws one and blends it.
        communicator: joins the workers of the run; None for a single process.
    """

    def __init__(
        self,
        images: Mapping[int, Tensor],
        *,
        factor: int,
        spec: ImageSpec,
        pool: ExtractorPool,
        seed: int,
        config: DistillConfig,
        frequencies: FrequencyConfig,
        augment: AugmentConfig,
        num_classes: int | None = None,
        device: torch.device | str = "cpu",
        communicator: Communicator | None = None,
    ) -> None:
        self.config, self.spec, self.seed = config, spec, seed
        self.factor, self.pool, self.augment = factor, pool, Augment(augment)
        self.device, precision = torch.device(device), getattr(torch, config.precision)
        self.dtype = torch.promote_types(precision, torch.float32)
        self.num_classes, self.step = num_classes or len(images), 0
        self.communicator = communicator or SingleProcess()
        self.images = {
            c: nn.Parameter(images[c].to(self.device, self.dtype, copy=True))
            for c in sorted(images)
        }
        self.optimizer = ImageOptimizer(self.images, config)
        self.objective = lookup("objective", config.objective, OBJECTIVES)
        pool.to(precision)
        quick = config.compile is not False and precision == torch.float32
        self.kernels = quick and self.device.type == "cpu"
        self.extractors = [
            FeatureExtractor(
                model,
                pool.native_features(number) if self.kernels else None,
                image_size=spec.image_size,
                tiles=factor**2,
                normalize=config.normalize_features and not self.objective.raw_features,
                device=self.device,
                precision=precision,
                num_steps=config.num_steps,
                chunk_size=config.chunk_size,
                graph_images=config.graph_images,
                torch_compile=config.compile,
                cuda_graphs=config.cuda_graphs,
            )
            for number, model in enumerate(pool.models)
        ]
        self.features = self.extractors[0]  # that of the step's network
        self.frequencies = Frequencies(
            frequencies,
            dims=[model.num_features for model in pool.models],
            networks=len(pool),
            seed=seed,
            learns=self.objective.uses_frequencies,
            device=self.device,
            dtype=self.dtype,
        )

    def update(self, real: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """One step on real images: class index -> (N_c, C, H, W) uint8 or float in [0, 1].

        The members of a group are given the same batches and each extracts its part of them.
        Returns sums over this worker's classes (detached, on the device; a member's share of them;
        of the last inner step), each to be divided by the number of classes once summed over the
        workers: the objective under its own name, `calibration` and `psi_objective`. Raises
        NonFiniteLossError before that loss changes any image.
        """
        cfg = self.config
        draw = self.augment.draw([self._generator("augment", c) for c in self.images])
        views = SiameseViews(self.augment, draw, self.spec, self.factor, self.dtype)
        # The extractor: lerp(initial, trained, beta) of one network of the pool.
        extractor, classifier = self.pool.draw_step(
            self._generator("extractor"), cfg.extractor, cfg.blend, cfg.calibration_ahead
        )
        self.pool.blend(*extractor)
        self.features = self.extractors[extractor.member % len(self.extractors)]
        self.frequencies.choose(extractor.member)
        held_out: list[Tensor] = []
        if self.frequencies.learns_between_classes:
            size = self.frequencies.config.held_out
            for_psi, real = HeldOut(real, size, rest=False), HeldOut(real, size, rest=True)
            held_out = self._real_features(for_psi, slice(None), views)
        # The features of one real batch serve all inner steps.
        kept = self._real_features(real, slice(None), views) if cfg.inner_steps > 1 else None

        def real_features(part: slice) -> list[Tensor]:
            return self._real_features(real, part, views) if kept is None else kept[part]

        metrics: dict[str, Tensor] = {}
        for inner in range(cfg.inner_steps):
            if inner and cfg.calibration:
                self.pool.blend(*extractor)  # calibration has another network
            metrics = self._minmax(_Step(real_features, held_out, views, classifier), inner)
        self.step += 1
        return metrics

    def _minmax(self, step: _Step, inner: int) -> dict[str, Tensor]:
        """One descent of the images and one ascent of psi, both from where the other stands.

        Some classes at a time, so that memory does not grow with their number.
        """
        cfg, ascents = self.config, self.frequencies.ascents
        # Synthetic images, as leaves of their own: a worker's classes are stepped together below.
        stored = [p.detach().requires_grad_() for p in self.images.values()]
        t, log_scales = self._frequencies(inner * max(1, ascents))
        objective = self.objective(self._comparison(t))
        ascent = PsiGradient(log_scales, self.num_classes) if ascents else None
        seen = list[tuple[list[Tensor], list[Tensor]]]()
        losses = []
        for part in self.features.blocks(stored):
            x = step.real_features(part)
            y, backward = self.features.synthetic(stored, part, step.views.synthetic)
            loss, gradients = objective(x, y)  # chf(t) and NCFD (eq. 7, 8), w.r.t. y
            losses.append(loss)
            # min: from the features back to the pixels
            backward(gradients, cfg.loss_weight)
            del gradients, backward  # and the graph, before psi's gradient needs memory
            # max: psi's gradient on the same features
            if ascent is not None and objective.match is not None and not step.held_out:
                ascent.add(objective.match, self.frequencies.config, cfg.alpha)
            if ascents > 1 and not step.held_out:
                seen.append((x, y))
        if ascent is not None and step.held_out:
            self._add_between_classes(ascent, step.held_out, t)
        by_class = [torch.cat(losses)] + ([] if ascent is None else [ascent.values])
        metrics = {objective.name: by_class[0].sum()}
        if cfg.calibration:
            metrics["calibration"] = self._calibrate(stored, step)
        gradient_sums = [p.grad.sum() for p in stored if p.grad is not None]
        self._check_finite(*by_class, torch.stack(gradient_sums))  # waits for a GPU once
        self.optimizer.step([images.grad for images in stored], cfg.learning_rate(self.step))
        if ascent is not None:
            metrics["psi_objective"] = by_class[1].sum()
            self._step_psi(ascent)
        for number in range(1, ascents):
            self._ascend_again(inner * ascents + number, step.held_out, seen)
        return {name: total / self.communicator.members for name, total in metrics.items()}

    def _ascend_again(
        self, number: int, held_out: list[Tensor], seen: list[tuple[list[Tensor], list[Tensor]]]
    ) -> None:
        """One more ascent of psi on the features of this step, at new frequencies."""
        t, log_scales = self._frequencies(number)
        ascent = PsiGradient(log_scales, self.num_classes)
        if held_out:
            self._add_between_classes(ascent, held_out, t)
        else:
            x, y = ([part for block in seen for part in block[side]] for side in (0, 1))
            match = self.objective(self._comparison(t)).compare(x, y)
            ascent.add(match, self.frequencies.config, self.config.alpha)
        self._check_finite(ascent.values)
        self._step_psi(ascent)

    def _add_between_classes(self, ascent: PsiGradient, held_out: list[Tensor], t: Tensor) -> None:
        ascent.add_between_classes(
            held_out, list(self.images), t, self.communicator, kernels=self.kernels
        )

    def _calibrate(self, stored: list[Tensor], step: _Step) -> Tensor:
        """Accumulate the gradient of the cross-entropy under the step's classifier.

        Returns the cross-entropy, summed over the classes.
        """
        model = self.pool.blend(*step.classifier)
        counts = [self.factor**2 * len(p) for p in stored]
        labels = torch.tensor(list(self.images)).repeat_interleave(torch.tensor(counts))
        labels = to_device(labels, self.device)
        weights = torch.cat([p.new_full((n,), 1 / n) for p, n in zip(stored, counts, strict=True)])
        total, start = torch.zeros((), device=self.device, dtype=self.dtype), 0
        for inputs in self.features.inputs(stored, slice(None), step.views.synthetic):
            end = start + sum(map(len, inputs))
            features = torch.cat([self.features(images) for images in inputs])
            logits = model.classifier(features.to(model.classifier.weight.dtype)).to(self.dtype)
            entropy = F.cross_entropy(logits, labels[start:end], reduction="none")
            loss = (entropy * weights[start:end]).sum()
            (self.config.calibration * loss).backward()
            total, start = total + loss.detach(), end
        return total

    def _step_psi(self, ascent: PsiGradient) -> None:
        """psi ascends the mean of the objective over all classes on all workers."""
        ascent.backward(self.communicator)
        self.frequencies.ascend()

    def _generator(self, purpose: str, *keys: int) -> torch.Generator:
        return keyed_generator(self.seed, purpose, self.step, *keys)

    def _real_features(
        self, real: Mapping[int, Tensor], part: slice, views: SiameseViews
    ) -> list[Tensor]:
        """Features (N_c, D) of this member's part of the real images of some classes."""
        own = list(self.images)[part]
        batches = (own_parts([real[c]], self.communicator)[0] for c in own)
        return self.features.real(batches, part.indices(len(self.images))[0], views.real)

    def _frequencies(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Frequencies (K, D), one set for all classes, and psi's log-scales (M, D), with its graph.

        Every ascent of a step has its own draw, and the descent that of the first.
        """
        return self.frequencies.draw(self.step, number)

    def _comparison(self, t: Tensor) -> Comparison:
        return Comparison(
            t=t,
            communicator=self.communicator,
            alpha=self.config.alpha,
            median=self.frequencies.config.bandwidth == "median",
            kernels=self.kernels,
        )

    def _check_finite(self, *values: Tensor) -> None:
        finite = torch.isfinite(torch.stack(values)).all(0).tolist()
        if not all(finite):
            bad = [c for c, fine in zip(self.images, finite, strict=True) if not fine]
            raise NonFiniteLossError(self.step, bad)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later step depends on, flat: `class/<index>/...` for each class, `psi/...`,
        `psi_optimizer/...`, `step`.
        """
        state = {"step": torch.tensor(self.step)}
        state |= self.optimizer.state_dict() | self.frequencies.state_dict()
        return {key: value.cpu().clone() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; it may hold more classes than this worker owns. Raises KeyError if
        one is missing.
        """
        self.step = int(state["step"])
        self.optimizer.load_state_dict(state)
        self.frequencies.load_state_dict(state)
