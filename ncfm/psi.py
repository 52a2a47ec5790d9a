"""The frequencies of a run, and psi's ascent: what it learns from, and its state.

Gradients are added up with respect to psi's log-scales (M, D), class by class, and go through psi
once. Each class's part is rounded to `GRADIENT_GRID` and summed in float64, which is exact: the sum
is the same number in whatever order classes and workers add to it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ncfm.communication import Communicator
from ncfm.discrepancy import CF, CFSums, cf_from_sums, smooth_sqrt, smooth_sqrt_slope
from ncfm.frequencies import FrequencyConfig, ScaleMixture, build_sampler
from ncfm.matching import Match, Waves, add_scale_gradients, sum_slopes, waves
from ncfm.seeding import keyed_generator

GRADIENT_GRID = 2.0**-44
"""Each class's part of psi's gradient is rounded to multiples of this, far below Adam's epsilon of
1e-8. In float64, sums of such numbers are exact up to 2^53 of it, 512."""


class PsiGradient:
    """The gradient of psi's objective, the mean over all classes, with respect to its log-scales
    (M, D), and the objective of each class that was added (`values`, (C,)).
    """

    def __init__(self, log_scales: Tensor | None, num_classes: int) -> None:
        assert log_scales is not None  # a fixed sampler does not ascend
        self.log_scales, self.unit = log_scales, GRADIENT_GRID * num_classes
        self.total = torch.zeros_like(log_scales, dtype=torch.float64, requires_grad=False)
        self._values: list[Tensor] = []

    @property
    def values(self) -> Tensor:
        """The objective of each class that was added, (C,)."""
        return torch.cat(self._values)

    def add(self, match: Match, config: FrequencyConfig, alpha: float) -> None:
        """Add some classes, their real features against the synthetic ones."""
        self._values.append(match.objective(config, alpha))
        match.add_scale_gradients(self.total, self.unit)

    def add_between(
        self,
        x: Sequence[Tensor],
        classes: Sequence[int],
        t: Tensor,
        communicator: Communicator,
        *,
        num_classes: int,
        kernels: bool = False,
    ) -> None:
        """Add all classes of this worker, the real ones against each other.

        `x` holds this worker's part of each class's held-out features, (N_c, D) each. The CF sums of
        all classes, (num_classes, 2 K + 1), are added up over all workers.
        """
        own = [waves(part[None], t) for part in x]
        sums = t.new_zeros(num_classes, 2 * len(t) + 1)
        sums[list(classes)] = torch.cat([w.sums() for w in own])
        sums = communicator.sum_all(sums)
        phi, counts = _cf(sums), sums[:, -1:]
        slopes = sum_slopes(between_classes_slopes(phi, counts), sums) * num_classes
        for c, w, part in zip(classes, own, x, strict=True):
            side = (w, slopes[c : c + 1], part[None])
            if len(part):
                add_scale_gradients(self.total, self.unit, [side], t, kernels=kernels)
        self._values.append(between_classes(phi, counts).expand(len(x)))

    def backward(self, communicator: Communicator) -> None:
        """All-reduce, then backpropagate into psi's parameters."""
        mean = communicator.sum_all(self.total) * GRADIENT_GRID
        self.log_scales.backward(mean.to(self.log_scales.dtype))


def _cf(sums: Tensor) -> CF:
    """Of sums (C, 2 K + 1); 0 for a class without samples."""
    k = sums.shape[1] // 2
    cos, sin, size = sums.split([k, k, 1], -1)
    return cf_from_sums(CFSums(cos, sin, size.clamp_min(1)))


# ------------------------------------------------------------------ the objective between classes


def between_classes(phi: CF, counts: Tensor) -> Tensor:
    """How well frequencies tell classes apart, (): the mean over k of the square root of S / N with

        S = mean over pairs of classes of |phi_c - phi_c'|^2
        N = mean over pairs of classes of (1 - |phi_c|^2) / n_c + (1 - |phi_c'|^2) / n_c'

    the squared discrepancy of two classes and what sampling noise alone makes of it: a t statistic
    of the random feature exp(j <t, x>), as two-sample tests choose their frequencies by. `phi` is
    the CF of every class, parts (C, K), from `counts` (C, 1) samples; classes without any do not
    count.
    """
    signal, noise, *_ = _between(phi, counts)
    return smooth_sqrt(signal / noise).mean()


def between_classes_slopes(phi: CF, counts: Tensor) -> CF:
    """Gradient of `between_classes` with respect to phi, each part (C, K)."""
    signal, noise, weight, centred = _between(phi, counts)
    classes = weight.sum()
    ratio = signal / noise
    of_signal = smooth_sqrt_slope(ratio) / (noise * ratio.shape[-1])
    spread = (1 - phi.squared_modulus() > 0) * weight / counts.clamp_min(1)
    of_real, of_imag = (
        of_signal * (4 / (classes - 1) * c + ratio * (4 / classes) * spread * part)
        for c, part in zip(centred, phi, strict=True)
    )
    return CF(of_real, of_imag)


def _between(phi: CF, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, CF]:
    """S and N plus 1e-6 (K,), 1 for every class with samples (C, 1), and phi minus its mean over
    those classes.

    The mean over pairs of |phi_c - phi_c'|^2 is 2 / (C - 1) times the sum of |phi_c - mean|^2.
    """
    weight = (counts > 0).to(phi.real.dtype)
    classes = weight.sum()
    centred = CF(*(weight * (part - (weight * part).sum(0) / classes) for part in phi))
    signal = centred.squared_modulus().sum(0) * (2 / (classes - 1))
    variance = weight * (1 - phi.squared_modulus()).clamp_min(0) / counts.clamp_min(1)
    return signal, variance.sum(0) * (2 / classes) + 1e-6, weight, centred


def split_held_out(batch: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """A class's real batch (N, ...): the images to match, and those that psi learns from, the last
    `held_out` of them, but at most half.
    """
    held = min(held_out, len(batch) // 2)
    return batch[: len(batch) - held], batch[len(batch) - held :]


# ------------------------------------------------------------------ the samplers


class FrequencySource:
    """The frequencies of every step: one sampler, or a psi for each network, and psi's optimiser.

    Args:
        dim: D, the dimension of the features.
        networks: networks of the pool.
        learn: whether psi, where it is the sampler, ascends.
    """

    def __init__(
        self,
        config: FrequencyConfig,
        *,
        dim: int,
        networks: int,
        learn: bool,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.seed, self.device, self.dtype = config, seed, device, dtype
        self.samplers = nn.ModuleList(
            build_sampler(config, dim, keyed_generator(seed, "psi_init", member))
            for member in range(networks if config.has_psi_per_network() else 1)
        ).to(device, dtype)
        self.sampler = self.samplers[0]  # that of the step's network
        self.optimizer = (
            torch.optim.Adam(
                self.samplers.parameters(),
                lr=config.lr,
                maximize=True,
                fused=device.type == "cpu" or None,  # on a GPU PyTorch's own choice
            )
            if config.sampler == "psi" and learn
            else None
        )

    @property
    def ascents(self) -> int:
        """Ascent steps per descent; 0 where nothing is learned."""
        return 0 if self.optimizer is None else self.config.ascents

    def select(self, member: int) -> None:
        """Take the sampler of a network of the pool."""
        self.sampler = self.samplers[member % len(self.samplers)]

    def draw(self, step: int, number: int) -> tuple[Tensor, Tensor | None]:
        """Frequencies (K, D), one set for all classes, and psi's log-scales (M, D), with its graph.

        Every ascent of a step has its own draw, and the descent that of the first.
        """
        generator = keyed_generator(self.seed, "frequencies", step, number, device=self.device)
        if isinstance(self.sampler, ScaleMixture):
            t, log_scales = self.sampler.draw(generator)
        else:
            t, log_scales = self.sampler(generator).to(self.dtype), None
        factor = self.config.curriculum(step)
        return (t if factor == 1 else t.mul_(factor)), log_scales

    def ascend(self, gradient: PsiGradient, communicator: Communicator) -> None:
        """psi ascends the mean of the objective over all classes on all workers."""
        assert self.optimizer is not None
        gradient.backward(communicator)
        self.optimizer.step()
        self.optimizer.zero_grad()  # the next step's may be another network's

    def state_dict(self) -> dict[str, Tensor]:
        """`psi/...` and `psi_optimizer/...`, flat."""
        state = {}
        for name, parameter in self.samplers.named_parameters():
            state[f"psi/{name}"] = parameter.detach()
            if self.optimizer is not None:
                state |= flat_state(self.optimizer, parameter, f"psi_optimizer/{name}/")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state. Raises KeyError if a part of psi is missing."""
        with torch.no_grad():
            for name, parameter in self.samplers.named_parameters():
                parameter.copy_(state[f"psi/{name}"])
                if self.optimizer is not None:
                    prefix = f"psi_optimizer/{name}/"
                    self.optimizer.state[parameter] = nested_state(state, prefix, self.device)


def flat_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, prefix: str
) -> dict[str, Tensor]:
    """The optimiser's state of one parameter, its keys behind a prefix."""
    return {
        f"{prefix}{key}": torch.as_tensor(value)
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }


def nested_state(
    state: Mapping[str, Tensor], prefix: str, device: torch.device
) -> dict[str, Tensor]:
    """The inverse of `flat_state`, copied."""
    # The step counter stays on the CPU, where torch's optimisers keep it.
    return {
        key.removeprefix(prefix): value.clone()
        if key.endswith("/step")
        else value.to(device, copy=True)
        for key, value in state.items()
        if key.startswith(prefix)
    }
