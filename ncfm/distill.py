"""The minmax step: psi ascends the discrepancy, the synthetic images descend it.

A `Distiller` owns the synthetic images of some classes (all of them, or one worker's share) and
updates each exactly once a step. What it does at a step depends on (seed, step, class) alone. It
knows no Ray: a `Communicator` joins it to the others. Workers that share the same classes form a
group: each extracts its part of the real batch, the sums over the parts are added up, and all make
the same update of the same images. So only sums and psi's gradient cross the network, never images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.augment import Augment, AugmentConfig
from ncfm.backend.compilation import can_compile
from ncfm.backend.memory import keep_freed_memory
from ncfm.communication import Alone, Communicator, own_parts
from ncfm.extractors import Blend, ExtractorKind, ExtractorPool
from ncfm.formation import decode
from ncfm.frequencies import FrequencyConfig, ScaleMixture, build_sampler
from ncfm.images import ImageSpec, to_device, to_unit
from ncfm.objectives import OBJECTIVES, Comparison
from ncfm.psi import HeldOut, PsiGradient
from ncfm.seeding import keyed_generator

BLOCK_CHUNKS = 4  # chunks of synthetic images whose graph is kept at a time, but a whole class
PREPARED_CHUNKS = 8  # chunks of images that are decoded and augmented together
CHUNK_PIXELS = {"cpu": 2**13, "cuda": 2**19}  # an extractor's activations: about 0.5 KiB each
GRAPH_PIXELS = 2**19
COMPILE_FROM = 500  # steps

Prepare = Callable[[Tensor, Tensor], Tensor]
"""Images and the index of each one's class -> what the extractor gets: normalised, augmented."""


class NonFiniteLossError(RuntimeError):
    """The loss of some classes, or its gradient, is NaN or infinite at a step; the message names
    both.
    """

    def __init__(self, step: int, classes: list[int]) -> None:
        super().__init__(step, classes)
        self.step, self.classes = step, classes

    def __str__(self) -> str:
        return f"step {self.step}: the loss of class {self.classes}, or its gradient, is not finite"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The matching of synthetic to real images."""

    num_steps: int = 20_000
    """Minmax steps (paper: 20 000)."""
    real_batch: int = 1024
    """Real images per class and step (paper: 1024); a smaller class is used whole."""
    easy_fraction: float = 1.0
    """Match, and start from, only this part of each class's real images: those that the pool's
    trained networks find easiest. Less than 1 may help where very few images are stored."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Learning rate of the images; every class takes exactly one optimiser step per minmax step."""
    momentum: float = 0.5
    """Momentum of the images' SGD; AdamW ignores it."""
    weight_decay: float = 5e-4
    objective: Literal["ncfd", "mmd", "mmd_raw"] = "ncfd"
    """What the images descend. `ncfd`: the discrepancy of characteristic functions. `mmd`: the
    squared distance of the mean features, a linear MMD; `mmd_raw`: that of raw features (DM,
    DANCE)."""
    alpha: float = 0.5
    """Weight of the amplitude against the phase (paper eq. 8)."""
    loss_weight: float = 300.0
    """Factor of the matching loss (released code: 300); it matters beside calibration or in SGD."""
    calibration: float = 1.0
    """Weight of the cross-entropy of the synthetic images under the trained network of the step
    (released code: 1, there with optimiser steps of its own); 0: none, which saves its passes."""
    calibration_ahead: tuple[int, int] | None = None
    """Take the cross-entropy from a snapshot that is later on the extractor's trajectory by a
    number of epochs uniform between these two (TGDD: 0 and 6), at most the last; needs snapshots as
    extractors. None: from the trained network (DANCE, NCFM)."""
    extractor: ExtractorKind = "blend"
    """A step's extractor. `blend`: between the initial and the trained weights of a network of the
    pool. `snapshot`: a snapshot of its training (TGDD); `snapshot_blend`: between two of them. Both
    need pretrain.snapshot_every."""
    blend: tuple[float, float] = (0.0, 1.0)
    """A blend is lerp(initial, trained, beta), or of two snapshots, beta uniform between these two
    (paper: 0 and 1). (0, 0): random networks, as DM has them; (1, 1): the trained ones."""
    clip_grad_norm: float | None = None
    """Greatest L2 norm of the gradient of one class's images; none by default."""
    clip_grad_value: float | None = None
    """Greatest absolute value of a pixel's gradient; none by default."""
    normalize_features: bool = True
    """L2-normalise every feature vector, so that one scale of frequencies fits all networks."""
    inner_steps: int = 1
    """Minmax updates per step, all on the features of one real batch, which cost the most; each has
    its own frequencies."""
    chunk_size: int | None = None
    """Images in one pass of the extractor. None: what fits the cache (CPU) or fills the device (see
    `default_chunk`)."""
    graph_images: int | None = None
    """Keep the graph of at most so many decoded synthetic images of a class; with more, their
    features are computed again, so that memory does not grow with their number. None: 512 at 32 px,
    32 at 128."""
    compile: bool | None = None
    """Compile the extractor. A ConvNet with instance norm, in float32 on a CPU, uses native kernels
    (`ncfm.backend.kernels`, two seconds), everything else torch.compile (half a minute). None:
    where it works (both need a C++ compiler), and torch.compile only in runs of at least 500 steps,
    which win its half a minute back."""
    cuda_graphs: bool = False
    """Replay what torch.compile makes of the extractor as CUDA graphs, which saves launches and
    costs memory. Without effect but on a GPU, where it has not been measured yet."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of all that is computed. `bfloat16`: the extractor alone; features are compared in float32,
    and images and psi are kept in it. On a CPU that multiplies it (AVX512_BF16, AMX) it makes what
    torch.compile compiles up to 1.5 times quicker, but our own kernels in float32 were quicker
    still; what it does to gradients and accuracy is in STUDY.md."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "real_batch", "inner_steps", "chunk_size", "graph_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 < self.easy_fraction <= 1:
            raise ValueError(f"easy_fraction must be within (0, 1], got {self.easy_fraction}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {self.alpha}")
        for name in ("weight_decay", "calibration", "momentum"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.blend[0] <= self.blend[1] <= 1:
            raise ValueError(f"blend must be two rising numbers within [0, 1], got {self.blend}")
        if (ahead := self.calibration_ahead) is not None:
            if not 0 <= ahead[0] <= ahead[1]:
                raise ValueError(f"calibration_ahead must be two rising numbers, got {ahead}")
            if self.extractor == "blend":
                raise ValueError(
                    "calibration_ahead counts from a snapshot of a trajectory: extractor must be "
                    f"'snapshot' or 'snapshot_blend', got {self.extractor!r}"
                )
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def default_chunk(image_size: int, device: torch.device) -> int:
    """Images in one pass of the extractor: 8 at 32 px on a CPU, 512 on a GPU; at least two."""
    return max(2, CHUNK_PIXELS.get(device.type, CHUNK_PIXELS["cuda"]) // image_size**2)


def default_graph_images(image_size: int) -> int:
    """Decoded synthetic images whose graph is kept: 512 at 32 px, 32 at 128."""
    return max(1, GRAPH_PIXELS // image_size**2)


@dataclass(frozen=True)
class _Step:
    """What the updates of one step have in common."""

    features: Callable[[slice], list[Tensor]]
    """Features of the real images of some classes."""
    held_out: list[Tensor]
    """Those of the images held out for psi; empty if it learns from the matched ones."""
    prepare: Prepare
    classifier: Blend


class Distiller:
    """Synthetic images of some classes, their optimiser, psi, and the step that updates them.

    Args:
        images: class index -> stored images (ipc, C, H, W) in [0, 1]; this worker's classes.
        num_classes: classes of the whole run, over all workers.
        pool: extractors; the step draws one and blends it.
        communicator: joins the workers of the run; None is for one worker alone.
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
        self.config, self.frequencies, self.spec, self.seed = config, frequencies, spec, seed
        self.factor, self.pool, self.augment = factor, pool, Augment(augment)
        self.device, precision = torch.device(device), getattr(torch, config.precision)
        self.dtype = torch.promote_types(precision, torch.float32)
        self.num_classes, self.step = num_classes or len(images), 0
        self.communicator = communicator or Alone()
        self.images = {
            c: nn.Parameter(images[c].to(self.device, self.dtype, copy=True))
            for c in sorted(images)
        }
        self.optimizer = self._image_optimizer()
        pool.to(precision)
        keep_freed_memory()
        self.chunk_size = config.chunk_size or default_chunk(spec.image_size, self.device)
        self.graph_images = config.graph_images or default_graph_images(spec.image_size)
        self.kernels = (
            config.compile is not False and self.device.type == "cpu" and precision == torch.float32
        )
        self.pass_size, self.compiled = self.chunk_size, False
        self.objective = OBJECTIVES[config.objective]
        self._body = self._extractor(precision)
        dim = pool.model.num_features
        self.samplers = nn.ModuleList(
            build_sampler(frequencies, dim, keyed_generator(seed, "psi_init", member))
            for member in range(len(pool) if frequencies.per_network else 1)
        ).to(self.device, self.dtype)
        self.sampler = self.samplers[0]  # that of the step's network
        self.psi_optimizer = (
            torch.optim.Adam(
                self.samplers.parameters(),
                lr=frequencies.lr,
                maximize=True,
                fused=self.device.type == "cpu" or None,  # on a GPU PyTorch's own choice
            )
            if isinstance(self.sampler, ScaleMixture) and self.objective.uses_frequencies
            else None
        )

    def _extractor(self, precision: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What gives the features (N, D) of images, the quickest that there is."""
        cfg, pool = self.config, self.pool
        frozen = pool.freeze() if self.kernels else None
        if frozen is not None:
            self.pass_size *= PREPARED_CHUNKS  # its cache is its own affair
            return frozen
        self.compiled = (
            cfg.num_steps >= COMPILE_FROM and can_compile(self.device.type)
            if cfg.compile is None
            else cfg.compile
        )
        # Eager norms are slow in channels-last; what is compiled for it is the quickest there is.
        layout = torch.channels_last if self.compiled else torch.preserve_format

        def body(images: Tensor) -> Tensor:
            images = images.to(precision, memory_format=layout)
            return pool.model.features(images).to(self.dtype)

        if not self.compiled:
            return body
        # The module never changes: looking each call up among its attributes took 0.1 ms of 3.
        compiled: Callable[[Tensor], Tensor] = torch.compile(
            body,
            dynamic=False,
            options={
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
                "triton.cudagraphs": cfg.cuda_graphs,
            },
        )
        return compiled

    def _image_optimizer(self) -> torch.optim.Optimizer:
        # Both are elementwise, and every class is stepped exactly once a step: the state of a class
        # is its own.
        cfg, params = self.config, list(self.images.values())
        if cfg.optimizer == "sgd":
            return torch.optim.SGD(
                params, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
            )
        return torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay)

    # ------------------------------------------------------------------ the step

    def update(self, real: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """One step on real images: class index -> (N_c, C, H, W) uint8 or float in [0, 1].

        The members of a group are given the same batches and each extracts its part of them.
        Returns sums over this worker's classes (detached, on the device; a member's share of them;
        of the last inner step), each to be divided by the number of classes once summed over the
        workers: the objective under its own name, `calibration` and `psi_objective`. Raises
        NonFiniteLossError before that loss changes any image.
        """
        cfg, classes = self.config, list(self.images)
        draw = self.augment.draw([self._generator("augment", c) for c in classes])
        extractor, classifier = self.pool.draw_step(
            self._generator("extractor"), cfg.extractor, cfg.blend, cfg.calibration_ahead
        )
        self.pool.blend(*extractor)
        self.sampler = self.samplers[extractor.member % len(self.samplers)]

        def prepare(images: Tensor, group: Tensor) -> Tensor:
            return self.augment.apply(self.spec.normalize(images), draw, group)

        held_out: list[Tensor] = []
        if self.frequencies.learns_between_classes and self.psi_optimizer is not None:
            size = self.frequencies.held_out
            psi_images, real = HeldOut(real, size, rest=False), HeldOut(real, size, rest=True)
            held_out = self._real_features(psi_images, slice(None), prepare)
        # The features of one real batch serve all inner steps.
        kept = self._real_features(real, slice(None), prepare) if cfg.inner_steps > 1 else None

        def features(part: slice) -> list[Tensor]:
            return self._real_features(real, part, prepare) if kept is None else kept[part]

        metrics: dict[str, Tensor] = {}
        for inner in range(cfg.inner_steps):
            if inner and cfg.calibration:
                self.pool.blend(*extractor)  # calibration has another network
            metrics = self._minmax(_Step(features, held_out, prepare, classifier), inner)
        self.step += 1
        return metrics

    def _minmax(self, step: _Step, inner: int) -> dict[str, Tensor]:
        """One descent of the images and one ascent of psi, both from where the other stands.

        Some classes at a time, so that memory does not grow with their number.
        """
        cfg, members = self.config, self.communicator.members
        # Synthetic images, as leaves of their own: a worker's classes are stepped together below.
        stored = [p.detach().requires_grad_() for p in self.images.values()]
        counts = [self.factor**2 * len(p) for p in stored]
        ascents = self.frequencies.ascents if self.psi_optimizer is not None else 0
        t, log_scales = self._frequencies(inner * max(1, ascents))
        ascent = None if not ascents else PsiGradient(log_scales, self.num_classes)
        objective = self.objective(self._comparison(t))
        seen_x: list[Tensor] = []
        seen_y: list[Tensor] = []
        losses = []
        for part in _slices(counts, min(BLOCK_CHUNKS * self.chunk_size, self.graph_images)):
            x = step.features(part)
            y, backward = self._forward(stored, part, step.prepare)
            values, gradients = objective(x, y)
            losses.append(values)
            # (1) min: from the features back to the pixels
            backward(gradients)
            del gradients, backward  # and the graph, before psi's gradient needs memory
            # (2) max: psi's gradient on the same features
            if ascent is not None and objective.match is not None and not step.held_out:
                ascent.add(objective.match, self.frequencies, cfg.alpha)
            if ascents > 1 and not step.held_out:
                seen_x, seen_y = seen_x + x, seen_y + y
        if ascent is not None and step.held_out:
            self._add_between_classes(ascent, step.held_out, t)
        by_class = [torch.cat(losses)] + ([] if ascent is None else [ascent.values])
        metrics: dict[str, Tensor] = {objective.name: by_class[0].sum() / members}
        if cfg.calibration:
            metrics["calibration"] = (
                self._calibrate(stored, step.prepare, step.classifier) / members
            )
        slopes = [p.grad.sum() for p in stored if p.grad is not None]
        self._check_finite(*by_class, torch.stack(slopes))  # waits for a GPU: once, for all classes
        self._step_images(stored)
        if ascent is not None:
            metrics["psi_objective"] = by_class[1].sum() / members
            self._step_psi(ascent)
        for number in range(1, ascents):
            t, log_scales = self._frequencies(inner * ascents + number)
            ascent = PsiGradient(log_scales, self.num_classes)
            if step.held_out:
                self._add_between_classes(ascent, step.held_out, t)
            else:
                match = self.objective(self._comparison(t)).compare(seen_x, seen_y)
                ascent.add(match, self.frequencies, cfg.alpha)
            self._check_finite(ascent.values)
            self._step_psi(ascent)
        return metrics

    def _add_between_classes(self, ascent: PsiGradient, held_out: list[Tensor], t: Tensor) -> None:
        ascent.add_between_classes(
            held_out, list(self.images), t, self.communicator, kernels=self.kernels
        )

    def _step_images(self, stored: list[Tensor]) -> None:
        cfg = self.config
        for parameter, copy in zip(self.images.values(), stored, strict=True):
            parameter.grad = copy.grad
            # Class by class: what a class does must not depend on which others share its worker.
            if cfg.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameter, cfg.clip_grad_norm)
            if cfg.clip_grad_value is not None:
                nn.utils.clip_grad_value_(parameter, cfg.clip_grad_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter in self.images.values():
                parameter.clamp_(0, 1)

    def _step_psi(self, ascent: PsiGradient) -> None:
        """psi ascends the mean of the objective over all classes on all workers."""
        assert self.psi_optimizer is not None
        ascent.backward(self.communicator)
        self.psi_optimizer.step()
        self.psi_optimizer.zero_grad()  # the next step's may be another network's

    def _generator(self, purpose: str, *keys: int) -> torch.Generator:
        return keyed_generator(self.seed, purpose, self.step, *keys)

    def _frequencies(self, number: int) -> tuple[Tensor, Tensor | None]:
        """Frequencies (K, D), one set for all classes, and psi's log-scales (M, D), with its graph.

        Every ascent of a step has its own draw, and the descent that of the first.
        """
        generator = keyed_generator(self.seed, "frequencies", self.step, number, device=self.device)
        if isinstance(self.sampler, ScaleMixture):
            t, log_scales = self.sampler.draw(generator)
        else:
            t, log_scales = self.sampler(generator).to(self.dtype), None
        factor = self.frequencies.curriculum(self.step)
        return (t if factor == 1 else t * factor), log_scales

    def _comparison(self, t: Tensor) -> Comparison:
        return Comparison(
            t=t,
            communicator=self.communicator,
            alpha=self.config.alpha,
            median=self.frequencies.bandwidth == "median",
            kernels=self.kernels,
        )

    def _check_finite(self, *values: Tensor) -> None:
        """Of all classes, each (C,)."""
        finite = torch.isfinite(torch.stack(values)).all(0).tolist()
        if not all(finite):
            bad = [c for c, fine in zip(self.images, finite, strict=True) if not fine]
            raise NonFiniteLossError(self.step, bad)

    def _calibrate(self, stored: list[Tensor], prepare: Prepare, classifier: Blend) -> Tensor:
        """Add the gradient of the cross-entropy under the step's classifier.

        Returns the entropy, summed over the classes.
        """
        model = self.pool.blend(*classifier)
        counts = [self.factor**2 * len(p) for p in stored]
        labels = torch.tensor(list(self.images)).repeat_interleave(torch.tensor(counts))
        labels = to_device(labels, self.device)
        weights = torch.cat([p.new_full((n,), 1 / n) for p, n in zip(stored, counts, strict=True)])
        total, start = torch.zeros((), device=self.device, dtype=self.dtype), 0
        for inputs in self._synthetic_inputs(stored, slice(None), prepare):
            end = start + sum(map(len, inputs))
            features = torch.cat([self._features(images) for images in inputs])
            logits = model.classifier(features.to(model.classifier.weight.dtype)).to(self.dtype)
            entropy = F.cross_entropy(logits, labels[start:end], reduction="none")
            loss = (entropy * weights[start:end]).sum()
            (self.config.calibration * loss).backward()
            total, start = total + loss.detach(), end
        return total

    # ------------------------------------------------------------------ features

    @torch.no_grad()
    def _real_features(
        self, real: Mapping[int, Tensor], part: slice, prepare: Prepare
    ) -> list[Tensor]:
        """Features (N_c, D) of the real images of some classes, whose batches are asked for one
        after the other: not all need to be in memory.
        """
        counts = list[int]()

        def batches() -> Iterator[Tensor]:
            for c in list(self.images)[part]:
                (batch,) = own_parts([real[c]], self.communicator)
                counts.append(len(batch))
                yield batch

        none = torch.empty(0, self.pool.model.num_features, dtype=self.dtype, device=self.device)
        features = [none]
        first = part.indices(len(self.images))[0]
        for images, group in _chunks(batches(), first, PREPARED_CHUNKS * self.chunk_size):
            inputs = prepare(to_unit(to_device(images, self.device)).to(self.dtype), group)
            features += [self._features(chunk) for chunk in inputs.split(self.pass_size)]
        return list(self._compared(torch.cat(features)).split(counts))

    def _synthetic_inputs(
        self, stored: list[Tensor], part: slice, prepare: Prepare
    ) -> Iterator[list[Tensor]]:
        """What the extractor gets of these classes, in chunks; those of one list share their graph,
        since a stored image is decoded as a whole.
        """
        formed = self.factor**2
        together = max(1, PREPARED_CHUNKS * self.chunk_size // formed)
        for images, group in _chunks(stored[part], part.indices(len(stored))[0], together):
            inputs = prepare(decode(images, self.factor), group.repeat_interleave(formed))
            yield list(inputs.split(self.pass_size))

    def _forward(
        self, stored: list[Tensor], part: slice, prepare: Prepare
    ) -> tuple[list[Tensor], Callable[[list[Tensor]], None]]:
        """Features (N_c, D) of the synthetic images of some classes, without a graph, and the way
        back: it takes the gradients of the loss to where the images' are added up.
        """
        counts = [self.factor**2 * len(images) for images in stored[part]]
        keep_graph = sum(counts) <= self.graph_images
        with torch.set_grad_enabled(keep_graph):
            found = [
                self._features(images)
                for inputs in self._synthetic_inputs(stored, part, prepare)
                for images in inputs
            ]
        features = torch.cat([chunk.detach() for chunk in found]).requires_grad_()
        compared = self._compared(features)

        def backward(gradients: list[Tensor]) -> None:
            slopes = torch.cat(gradients).mul_(self.config.loss_weight)
            (slopes,) = torch.autograd.grad(compared, features, slopes)
            pieces = list(slopes.split([len(chunk) for chunk in found]))
            if keep_graph:
                torch.autograd.backward(found, pieces)
                return
            for inputs in self._synthetic_inputs(stored, part, prepare):
                again = [self._features(images) for images in inputs]
                torch.autograd.backward(again, pieces[: len(again)])
                del pieces[: len(again)]

        return list(compared.detach().split(counts)), backward

    def _compared(self, features: Tensor) -> Tensor:
        """Features (N, D) as they are matched: normalised or raw."""
        normalized = self.config.normalize_features and not self.objective.raw_features
        return F.normalize(features, dim=-1) if normalized else features

    def _features(self, images: Tensor) -> Tensor:
        """Features (N, D) of a chunk; what torch compiles sees whole ones only: fewer images are
        padded, then cut.
        """
        if not self.compiled:
            return self._body(images)
        missing = self.chunk_size - len(images)
        inputs = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images
        features = self._body(inputs)[: len(images)]
        # The next replay of a CUDA graph writes where this one's features are.
        return features.clone() if self.config.cuda_graphs else features

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later step depends on, flat: `class/<index>/...` for each class, `psi/...`,
        `step`.
        """
        state = {"step": torch.tensor(self.step)}
        for c, parameter in self.images.items():
            state[f"class/{c}/images"] = parameter.detach()
            for name, value in self.optimizer.state[parameter].items():
                if value is not None:
                    state[f"class/{c}/optimizer/{name}"] = torch.as_tensor(value)
        for name, parameter in self.samplers.named_parameters():
            state[f"psi/{name}"] = parameter.detach()
            if self.psi_optimizer is not None:
                for key, value in self.psi_optimizer.state[parameter].items():
                    state[f"psi_optimizer/{name}/{key}"] = torch.as_tensor(value)
        return {key: value.cpu().clone() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; it may hold more classes than this worker owns. Raises KeyError if
        one is missing.
        """
        self.step = int(state["step"])
        with torch.no_grad():
            for c, parameter in self.images.items():
                parameter.copy_(state[f"class/{c}/images"])
                self.optimizer.state[parameter] = self._optimizer_state(
                    state, f"class/{c}/optimizer/"
                )
            for name, parameter in self.samplers.named_parameters():
                parameter.copy_(state[f"psi/{name}"])
                if self.psi_optimizer is not None:
                    self.psi_optimizer.state[parameter] = self._optimizer_state(
                        state, f"psi_optimizer/{name}/"
                    )

    def _optimizer_state(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        # The step counter stays on the CPU, where torch's optimisers keep it.
        return {
            key.removeprefix(prefix): value.clone()
            if key.endswith("/step")
            else value.to(self.device, copy=True)
            for key, value in state.items()
            if key.startswith(prefix)
        }


def _slices(counts: list[int], limit: int) -> list[slice]:
    """Neighbouring parts, as many together as have up to `limit` rows, but at least one."""
    slices, start = [], 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or sum(counts[start : end + 1]) > limit:
            slices.append(slice(start, end))
            start = end
    return slices


def _chunks(tensors: Iterable[Tensor], first: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through tensors as if they were one: up to `size` rows, and the number of the tensor
    that each row is from, counted from `first`.
    """
    rows: list[Tensor] = []
    groups: list[Tensor] = []
    room = size
    for g, tensor in enumerate(tensors, first):
        start = 0
        while start < len(tensor):
            piece = tensor[start : start + room]
            rows.append(piece)
            groups.append(torch.full((len(piece),), g))
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield torch.cat(rows), torch.cat(groups)
                rows, groups, room = [], [], size
    if rows:
        yield torch.cat(rows), torch.cat(groups)
