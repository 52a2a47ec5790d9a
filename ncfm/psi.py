"""The frequencies of every step, and psi's gradient, which is the same number in whatever order it
is summed over classes and workers.

Gradients are added up with respect to psi's log-scales (M, D), class by class, and go through psi
once. Each class's part is rounded to `GRADIENT_GRID` and summed in float64, which is exact.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ncfm.communication import Communicator
from ncfm.discrepancy import CF, CFSums, cf_from_sums, smooth_sqrt, smooth_sqrt_derivative
from ncfm.frequencies import FrequencyConfig, ScaleMixture, build_sampler
from ncfm.matching import Match, add_scale_gradients, cos_sin, gradient_wrt_sums
from ncfm.seeding import keyed_generator
from ncfm.training_state import load_optimizer_state, optimizer_state

GRADIENT_GRID = 2.0**-44
"""Each class's part of psi's gradient is rounded to multiples of this, far below Adam's epsilon of
1e-8. In float64, sums of such numbers are exact up to 2^53 of it, 512."""


class Frequencies:
    """The frequencies of every step, from one sampler for each architecture or one for each network
    of the pool, and psi's optimiser.

    Args:
        dims: dimension of the features of each architecture, which the networks have in turn.
        networks: those of the pool.
        learns: whether what the images descend depends on frequencies, so that psi may ascend it.
    """

    def __init__(
        self,
        config: FrequencyConfig,
        *,
        dims: Sequence[int],
        networks: int,
        seed: int,
        learns: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.seed, self.device, self.dtype = config, seed, device, dtype
        self.samplers = nn.ModuleList(
            build_sampler(
                config, dims[member % len(dims)], keyed_generator(seed, "psi_init", member)
            )
            for member in range(networks if config.per_network else len(dims))
        ).to(device, dtype)
        self.sampler = self.samplers[0]  # that of the step's network
        self.optimizer = (
            torch.optim.Adam(
                self.samplers.parameters(),
                lr=config.lr,
                maximize=True,
                fused=device.type == "cpu" or None,  # on a GPU PyTorch's own choice
            )
            if isinstance(self.sampler, ScaleMixture) and learns
            else None
        )

    @property
    def ascents(self) -> int:
        """Ascent steps of psi in each minmax update; 0 with a fixed sampler."""
        return self.config.ascents if self.optimizer is not None else 0

    @property
    def learns_between_classes(self) -> bool:
        """Whether psi ascends the discrepancy between real classes."""
        return self.optimizer is not None and self.config.learns_between_classes

    def choose(self, member: int) -> None:
        """Use the sampler of a network of the pool."""
        self.sampler = self.samplers[member % len(self.samplers)]

    def draw(self, step: int, number: int) -> tuple[Tensor, Tensor | None]:
        """Frequencies (K, D), one set for all classes, and psi's log-scales (M, D), with its graph;
        `number` counts the draws of a step.
        """
        generator = keyed_generator(self.seed, "frequencies", step, number, device=self.device)
        if isinstance(self.sampler, ScaleMixture):
            t, log_scales = self.sampler.draw(generator)
        else:
            t, log_scales = self.sampler(generator).to(self.dtype), None
        factor = self.config.curriculum(step)
        return (t if factor == 1 else t * factor), log_scales

    def ascend(self) -> None:
        """psi's optimiser step along the gradient that was accumulated."""
        assert self.optimizer is not None  # a fixed sampler does not ascend
        self.optimizer.step()
        self.optimizer.zero_grad()  # the next step's may be another network's

    def state_dict(self) -> dict[str, Tensor]:
        """psi's parameters and optimiser state, flat: `psi/...` and `psi_optimizer/...`."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.samplers.named_parameters():
            state[f"psi/{name}"] = parameter.detach()
            if self.optimizer is not None:
                state |= optimizer_state(self.optimizer, parameter, f"psi_optimizer/{name}/")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state. Raises KeyError if a parameter is missing."""
        for name, parameter in self.samplers.named_parameters():
            with torch.no_grad():
                parameter.copy_(state[f"psi/{name}"])
            if self.optimizer is not None:
                load_optimizer_state(self.optimizer, parameter, state, f"psi_optimizer/{name}/")


class PsiGradient:
    """The gradient of psi's objective, the mean over all classes, with respect to its log-scales
    (M, D), and the objective of each class that was added.
    """

    def __init__(self, log_scales: Tensor | None, num_classes: int) -> None:
        assert log_scales is not None  # a fixed sampler does not ascend
        self.log_scales, self.num_classes = log_scales, num_classes
        self.unit = GRADIENT_GRID * num_classes
        self.total = torch.zeros_like(log_scales, dtype=torch.float64, requires_grad=False)
        self._values: list[Tensor] = []

    @property
    def values(self) -> Tensor:
        """The objective of each class that was added, (C,)."""
        return torch.cat(self._values)

    def add(self, match: Match, config: FrequencyConfig, alpha: float) -> None:
        """Accumulate these classes' gradient, of the real against the synthetic features."""
        self._values.append(match.objective(config, alpha))
        match.add_scale_gradients(self.total, self.unit)

    def add_between_classes(
        self,
        x: Sequence[Tensor],
        classes: Sequence[int],
        t: Tensor,
        communicator: Communicator,
        *,
        kernels: bool = False,
    ) -> None:
        """Accumulate the gradient of all classes, the real features against each other.

        `x` holds this worker's part of the held-out features of its `classes`, (N_c, D) each. The
        sums of the CFs of all classes, (num_classes, 2 K + 1), are added up over all workers.
        Cosines and sines are computed twice, so that only those of one class are in memory.
        """
        sums = t.new_zeros(self.num_classes, 2 * len(t) + 1)
        for c, part in zip(classes, x, strict=True):
            sums[c] = cos_sin(part[None], t).sums()[0]
        sums = communicator.sum_all(sums)
        phi, counts = _class_cfs(sums)
        self._values.append(between_classes(phi, counts).expand(len(x)))
        sums[:, -1].clamp_min_(1)
        # `unit` is of a mean over the classes; here every class has its part of one value.
        of_sums = gradient_wrt_sums(between_classes_gradient(phi, counts), sums) * self.num_classes
        for c, part in zip(classes, x, strict=True):
            if len(part):
                side = (cos_sin(part[None], t), of_sums[c : c + 1], part[None])
                add_scale_gradients(self.total, self.unit, [side], t, kernels=kernels)

    def backward(self, communicator: Communicator) -> None:
        """All-reduce, then backpropagate into psi's parameters."""
        mean = communicator.sum_all(self.total) * GRADIENT_GRID
        self.log_scales.backward(mean.to(self.log_scales.dtype))


def _class_cfs(sums: Tensor) -> tuple[CF, Tensor]:
    """From sums (C, 2 K + 1) the CF of every class, 0 without samples, and their numbers (C, 1)."""
    k, counts = sums.shape[1] // 2, sums[:, -1:].clone()
    cos, sin, _ = sums.split([k, k, 1], -1)
    return cf_from_sums(CFSums(cos, sin, counts.clamp_min(1))), counts


def between_classes(phi: CF, counts: Tensor) -> Tensor:
    """How well frequencies tell classes apart, (): the mean over k of sqrt(S / N), with

        S = mean over pairs of classes of |phi_c - phi_c'|^2
        N = mean over pairs of classes of (1 - |phi_c|^2) / n_c + (1 - |phi_c'|^2) / n_c'

    the squared discrepancy of two classes, and what sampling noise alone makes of it: the signal to
    noise ratio by which optimised two-sample tests choose frequencies. `phi` has parts (C, K), from
    `counts` (C, 1) samples; classes without any do not count.
    """
    signal, noise, *_ = _signal_and_noise(phi, counts)
    return smooth_sqrt(signal / noise).mean()


def between_classes_gradient(phi: CF, counts: Tensor) -> CF:
    """Gradient of `between_classes` with respect to phi, each part (C, K)."""
    signal, noise, present, centred = _signal_and_noise(phi, counts)
    classes, ratio = present.sum(), signal / noise
    of_signal = smooth_sqrt_derivative(ratio) / (noise * ratio.shape[-1])
    of_noise = -of_signal * ratio
    inside = (phi.squared_modulus() < 1) * present / counts.clamp_min(1)
    of_real, of_imag = (
        of_signal * (4 / (classes - 1).clamp_min(1)) * centred_part
        - of_noise * (4 / classes) * inside * part
        for centred_part, part in zip(centred, phi, strict=True)
    )
    return CF(of_real, of_imag)


def _signal_and_noise(phi: CF, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, CF]:
    """S and N (K,), N plus 1e-6; 1 for every class with samples, (C, 1); and phi minus its mean
    over these.

    The mean over pairs of |phi_c - phi_c'|^2 is 2 / (C - 1) times the sum of |phi_c - mean|^2.
    """
    present = (counts > 0).to(phi.real.dtype)
    classes = present.sum()
    real, imag = (present * (part - (present * part).sum(0) / classes) for part in phi)
    centred = CF(real, imag)
    signal = centred.squared_modulus().sum(0) * (2 / (classes - 1).clamp_min(1))
    variance = present * (1 - phi.squared_modulus()).clamp_min(0) / counts.clamp_min(1)
    return signal, variance.sum(0) * (2 / classes) + 1e-6, present, centred


class HeldOut(Mapping[int, Tensor]):
    """The real batches of a step: what is held out of them for psi, or else the rest."""

    def __init__(self, real: Mapping[int, Tensor], size: int, *, rest: bool) -> None:
        self._real, self._size, self._rest = real, size, rest

    def __getitem__(self, class_index: int) -> Tensor:
        rest, held_out = split_held_out(self._real[class_index], self._size)
        return rest if self._rest else held_out

    def __iter__(self) -> Iterator[int]:
        return iter(self._real)

    def __len__(self) -> int:
        return len(self._real)


def split_held_out(batch: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """A class's real batch (N, ...): the images to match, and those for psi, `held_out` of them but
    at most half, evenly spread, since a batch may be in some order.
    """
    count = min(held_out, len(batch) // 2)
    held = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    held[torch.arange(count, device=batch.device) * len(batch) // max(1, count)] = True
    return batch[~held], batch[held]
