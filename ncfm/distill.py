"""The minmax step: psi ascends the discrepancy, the synthetic images descend it.

A `Distiller` owns the synthetic images of some classes (all of them, or one worker's share) and
updates each exactly once a step. What it does at a step depends on (seed, step, class) alone. It
knows no Ray: a `Communicator` joins it to the others. Workers that share the same classes form a
group: each extracts its part of the real batch, the sums over the parts are added up, and all make
the same update of the same images. So only sums and psi's gradient cross the network, never images.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.augment import Augment, AugmentConfig
from ncfm.communication import Alone, Communicator, group_total
from ncfm.discrepancy import CFSums, cf_from_sums, cf_sums, linear_mmd, ncfd
from ncfm.extractors import ExtractorPool
from ncfm.formation import decode
from ncfm.frequencies import FrequencyConfig, ScaleMixture, build_sampler, psi_objective
from ncfm.images import ImageSpec, to_unit
from ncfm.seeding import keyed_generator


class NonFiniteLossError(RuntimeError):
    """The loss of some classes is NaN or infinite at a step; the message names both."""

    def __init__(self, step: int, classes: list[int]) -> None:
        super().__init__(step, classes)
        self.step, self.classes = step, classes

    def __str__(self) -> str:
        return f"step {self.step}: the loss of class {self.classes} is not finite"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The matching of synthetic to real images."""

    num_steps: int = 20_000
    """Minmax steps (paper: 20 000)."""
    real_batch: int = 1024
    """Real images per class and step (paper: 1024); a smaller class is used whole."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Learning rate of the images; every class takes exactly one optimiser step per minmax step."""
    momentum: float = 0.5
    """Momentum of the images' SGD; AdamW ignores it."""
    weight_decay: float = 5e-4
    objective: Literal["ncfd", "mmd"] = "ncfd"
    """`mmd` is DM's linear MMD in the same loop, for comparison."""
    alpha: float = 0.5
    """Weight of the amplitude against the phase (paper eq. 8)."""
    loss_weight: float = 300.0
    """Factor of the matching loss (released code: 300); it matters beside calibration or in SGD."""
    calibration: float = 1.0
    """Weight of the cross-entropy of the synthetic images under the trained network of the step
    (released code: 1, there with optimiser steps of its own); 0: none, which saves its passes."""
    blend: tuple[float, float] = (0.0, 1.0)
    """A step's extractor is lerp(initial, trained, beta), beta uniform between these two (paper:
    0 and 1). (0, 0): random networks, as DM has them; (1, 1): the trained ones."""
    clip_grad_norm: float | None = None
    """Greatest L2 norm of the gradient of one class's images; none by default."""
    clip_grad_value: float | None = None
    """Greatest absolute value of a pixel's gradient; none by default."""
    normalize_features: bool = True
    """L2-normalise every feature vector, so that one scale of frequencies fits all networks."""
    chunk_size: int = 64
    """Images in one pass of the extractor: what fits the cache (CPU) or fills the device (GPU)."""
    graph_images: int = 4096
    """Keep the graph of at most so many decoded synthetic images between the ascent and the
    descent; beyond, their features are computed again, so that memory does not grow with the number
    of classes.
    """
    compile: bool = False
    """torch.compile the extractor: about twice as fast on a CPU, after half a minute."""
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        for name in ("num_steps", "real_batch", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], got {self.alpha}")
        for name in ("weight_decay", "calibration", "momentum"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.blend[0] <= self.blend[1] <= 1:
            raise ValueError(f"blend must be two rising numbers within [0, 1], got {self.blend}")
        for name in ("clip_grad_norm", "clip_grad_value"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


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
        self.device, self.dtype = torch.device(device), getattr(torch, config.precision)
        self.num_classes, self.step = num_classes or len(images), 0
        self.communicator = communicator or Alone()
        self.images = {
            c: nn.Parameter(images[c].to(self.device, self.dtype, copy=True))
            for c in sorted(images)
        }
        self.optimizer = self._image_optimizer()
        pool.to(self.dtype)
        self._extract = (
            torch.compile(self._features, dynamic=False) if config.compile else self._features
        )
        dim = pool.model.num_features
        self.sampler = build_sampler(frequencies, dim, keyed_generator(seed, "psi_init"))
        self.sampler.to(self.device, self.dtype)
        self.psi_optimizer = (
            torch.optim.Adam(self.sampler.parameters(), lr=frequencies.lr, maximize=True)
            if isinstance(self.sampler, ScaleMixture) and config.objective == "ncfd"
            else None  # the linear MMD knows no frequencies
        )

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
        """One minmax step on real images: class index -> (N_c, C, H, W) uint8 or float in [0, 1].

        The members of a group are given the same batches and each extracts its part of them.
        Returns per-class sums over this worker's classes (detached, on the device; a member's share
        of them), each to be divided by the number of classes once summed over the workers. Raises
        NonFiniteLossError before any image is changed.
        """
        cfg, classes = self.config, list(self.images)
        draw = self.augment.draw([self._generator("augment", c) for c in classes])
        self.pool.blend(*self.pool.draw(self._generator("extractor"), cfg.blend))

        def prepare(images: Tensor, group: Tensor) -> Tensor:
            return self.augment.apply(self.spec.normalize(images), draw, group)

        real_parts = self._my_parts([real[c] for c in classes])
        with torch.no_grad():
            extracted = [
                self._extract_padded(prepare(to_unit(i.to(self.device)).to(self.dtype), g))
                for i, g in _chunks(real_parts, cfg.chunk_size)
            ]
            none = torch.empty(0, self.pool.model.num_features, dtype=self.dtype)
            x = torch.cat(extracted or [none.to(self.device)]).split([len(p) for p in real_parts])

        # Synthetic images, as leaves of their own: the graph reaches the pixels in chunks, not all
        # classes at once.
        stored = [p.detach().requires_grad_() for p in self.images.values()]
        formed = self.factor**2
        per_chunk = max(1, cfg.chunk_size // formed)

        def synthetic_inputs() -> Iterator[Tensor]:
            for images, group in _chunks(stored, per_chunk):
                yield prepare(decode(images, self.factor), group.repeat_interleave(formed))

        count = formed * sum(len(p) for p in stored)
        keep_graph = self.psi_optimizer is None or count <= cfg.graph_images
        with torch.set_grad_enabled(keep_graph):
            chunks = [self._extract_padded(inputs) for inputs in synthetic_inputs()]
        y = torch.cat(chunks).detach().requires_grad_()
        y_parts = y.split([formed * len(p) for p in stored])

        psi_value = self._ascend(x, [part.detach() for part in y_parts])
        losses = self._discrepancies(x, y_parts)
        self._check_finite(losses)
        (y_grad,) = torch.autograd.grad(cfg.loss_weight * losses.sum(), y)
        grads = y_grad.split([len(chunk) for chunk in chunks])
        if keep_graph:
            torch.autograd.backward(chunks, list(grads))
        else:
            for inputs, grad in zip(synthetic_inputs(), grads, strict=True):
                self._extract_padded(inputs).backward(grad)
        members = self.communicator.members
        metrics = {"ncfd": losses.detach().sum() / members}
        if psi_value is not None:
            metrics["psi_objective"] = psi_value / members
        if cfg.calibration:
            metrics["calibration"] = self._calibrate(classes, stored, synthetic_inputs) / members

        for parameter, leaf in zip(self.images.values(), stored, strict=True):
            parameter.grad = leaf.grad
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
        self.step += 1
        return metrics

    def _generator(self, purpose: str, *keys: int) -> torch.Generator:
        return keyed_generator(self.seed, purpose, self.step, *keys)

    def _frequencies(self, ascent: int) -> Tensor:
        """The step's frequencies (K, D), one set for all classes; each ascent has its own draws."""
        generator = keyed_generator(self.seed, "frequencies", self.step, ascent, device=self.device)
        frequencies: Tensor = self.sampler(generator)
        return frequencies.to(self.dtype)

    def _my_parts(self, batches: list[Tensor]) -> list[Tensor]:
        """This member's part of every class's batch; a part is empty if the batch is too small."""
        members, member = self.communicator.members, self.communicator.member
        return [batch.tensor_split(members)[member] for batch in batches]

    def _ascend(self, x: tuple[Tensor, ...], y: list[Tensor]) -> Tensor | None:
        """(1) max: psi ascends on the current features, the images held fixed.

        Returns its objective, summed over the classes.
        """
        if self.psi_optimizer is None:
            return None
        value = torch.zeros((), device=self.device, dtype=self.dtype)
        y = self._my_parts(y)  # all members have all of them: each sample's gradient counts once
        for ascent in range(self.frequencies.ascents):
            t = self._frequencies(ascent)
            sums_x, sums_y = self._group_sums(_stack_sums(x, t), _stack_sums(y, t))
            values = psi_objective(
                cf_from_sums(sums_x),
                cf_from_sums(sums_y),
                sums_x.size,
                sums_y.size,
                self.frequencies,
                self.config.alpha,
            )
            self._check_finite(values)
            value = values.sum()
            parameters = list(self.sampler.parameters())
            grads = torch.autograd.grad(value / self.num_classes, parameters)
            flat = self.communicator.sum_all(torch.cat([g.reshape(-1) for g in grads]))
            for parameter, grad in zip(
                parameters, flat.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad = grad.view_as(parameter)
            self.psi_optimizer.step()
        return value.detach()

    def _discrepancies(self, x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Tensor:
        """(2) min: the loss of each class, (classes,), under the updated psi."""
        if self.config.objective == "mmd":
            sums = [torch.cat([p.sum(0), p.new_full((1,), len(p))]) for p in x]
            totals = group_total(torch.stack(sums), self.communicator)
            means = totals[:, None, :-1] / totals[:, None, -1:]
            return torch.stack([linear_mmd(a, b) for a, b in zip(means, y, strict=True)])
        with torch.no_grad():
            t = self._frequencies(self.frequencies.ascents)
            (sums_x,) = self._group_sums(_stack_sums(x, t))
        phi_x, phi_y = cf_from_sums(sums_x), cf_from_sums(_stack_sums(y, t))
        return ncfd(phi_x, phi_y, self.config.alpha)

    def _group_sums(self, *shares: CFSums) -> list[CFSums]:
        """The group's sums from the members' shares, in one message of (classes, 2 K + 1) each."""
        if self.communicator.members == 1:
            return list(shares)
        total = group_total(torch.stack([torch.cat(s, -1) for s in shares]), self.communicator)
        k = shares[0].cos.shape[-1]
        return [CFSums(*rows.split([k, k, 1], -1)) for rows in total]

    def _check_finite(self, values: Tensor) -> None:
        finite = torch.isfinite(values.detach())
        if not finite.all():
            bad = [c for c, fine in zip(self.images, finite.tolist(), strict=True) if not fine]
            raise NonFiniteLossError(self.step, bad)

    def _calibrate(
        self, classes: list[int], stored: list[Tensor], inputs: Callable[[], Iterator[Tensor]]
    ) -> Tensor:
        """Add the gradient of the cross-entropy under the trained network of the step.

        Returns the entropy, summed over the classes.
        """
        index, _ = self.pool.draw(self._generator("extractor"))
        model = self.pool.blend(index, 1.0)
        formed = self.factor**2
        labels = torch.cat(
            [
                torch.full((formed * len(p),), c, device=self.device)
                for c, p in zip(classes, stored, strict=True)
            ]
        )
        weights = torch.cat([p.new_full((formed * len(p),), 1 / (formed * len(p))) for p in stored])
        total, offset = torch.zeros((), device=self.device, dtype=self.dtype), 0
        for images in inputs():
            part = slice(offset, offset + len(images))
            entropy = F.cross_entropy(model(images), labels[part], reduction="none")
            loss = (entropy * weights[part]).sum()
            (self.config.calibration * loss).backward()
            total, offset = total + loss.detach(), part.stop
        return total

    # ------------------------------------------------------------------ features

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.pool.model.features(images)
        return F.normalize(features, dim=-1) if self.config.normalize_features else features

    def _extract_padded(self, images: Tensor) -> Tensor:
        """Features (N, D). A compiled extractor sees one shape only: a smaller chunk is padded,
        then cut.
        """
        if not self.config.compile:
            return self._extract(images)
        missing = self.config.chunk_size - len(images)
        return self._extract(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)))[: len(images)]

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
        for name, parameter in self.sampler.named_parameters():
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
            for name, parameter in self.sampler.named_parameters():
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


def _stack_sums(parts: tuple[Tensor, ...] | list[Tensor], t: Tensor) -> CFSums:
    """The CF sums of several classes, parts (N_c, D) each, as one of shape (classes, K)."""
    sums = [cf_sums(part, t) for part in parts]
    return CFSums(*(torch.stack(field) for field in zip(*sums, strict=True)))


def _chunks(parts: list[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through tensors as if they were one: up to `size` rows, and the index of the part each
    row is from.
    """
    rows: list[Tensor] = []
    groups: list[Tensor] = []
    room = size
    for g, part in enumerate(parts):
        for piece in part.split([min(room, len(part)), *_sizes(len(part) - room, size)]):
            rows.append(piece)
            groups.append(torch.full((len(piece),), g))
            room -= len(piece)
            if room == 0:
                yield torch.cat(rows), torch.cat(groups)
                rows, groups, room = [], [], size
    if room < size:
        yield torch.cat(rows), torch.cat(groups)


def _sizes(total: int, size: int) -> list[int]:
    """`total` cut into pieces of `size` and a smaller last one."""
    full, rest = divmod(max(total, 0), size)
    return [size] * full + [rest] * bool(rest)
