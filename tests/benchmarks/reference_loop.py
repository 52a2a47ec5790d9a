"""The paper's own loop, as one would write it from the paper: what bench_step.py compares with.

One class at a time, float32, eager; the network's weights, blended, are read from disk each step;
the real features without a graph, as in the released code; psi's gradient by a second backward
through the whole graph, that of the extractor included. Beyond the paper, as here: psi ascends
`psi_objective`, once a step, and every class's images take one optimiser step. As in the released
code, psi ascends on the frequencies that the images descend at.

An oracle must not import what it checks: the discrepancy, psi's objective, the tiles of an image
and the augmentation are written here from the papers' definitions. From `ncfm` come configuration,
networks, psi's network and the random draws.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.distill import Distiller
from ncfm.frequencies import ScaleMixture
from ncfm.models import Classifier
from ncfm.models.layers import AveragePool
from ncfm.seeding import keyed_generator


def discrepancy(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Eq. 7 at alpha = 0.5, from the definition: mean_k sqrt(|phi_X(t_k) - phi_Y(t_k)|^2 / 2)."""
    angles_x, angles_y = x @ t.T, y @ t.T
    real = angles_x.cos().mean(0) - angles_y.cos().mean(0)
    imag = angles_x.sin().mean(0) - angles_y.sin().mean(0)
    return ((real.square() + imag.square()) / 2 + 1e-24).sqrt().mean()


def psi_objective(x: Tensor, y: Tensor, t: Tensor, kind: str) -> Tensor:
    """What psi ascends: the discrepancy itself (`ncfd`, eq. 7), the squared difference beyond what
    sampling noise explains (`excess`), or in units of it (`ratio`). Noise: the variance of a mean
    of N independent exp(j <t, x>) is (1 - |phi|^2) / N.
    """
    if kind == "ncfd":
        return discrepancy(x, y, t)
    phi_x, phi_y = (torch.exp(1j * (z @ t.T)).mean(0) for z in (x, y))
    difference = (phi_x - phi_y).abs().square()
    noise = (1 - phi_x.abs().square()) * (1 / len(x) + 1 / len(y))
    if kind == "excess":
        return (difference - noise).mean()
    return (difference / (noise + 1e-6) + 1e-24).sqrt().mean()


def tiles(images: Tensor, factor: int) -> Tensor:
    """Multi-formation (IDC): every tile of factor x factor, row by row, upsampled to full size.
    The factor divides the size.
    """
    n, _, height, width = images.shape
    h, w = height // factor, width // factor
    cut = [
        images[i : i + 1, :, row * h : (row + 1) * h, column * w : (column + 1) * w]
        for i in range(n)
        for row in range(factor)
        for column in range(factor)
    ]
    return F.interpolate(torch.cat(cut), (height, width), mode="bilinear", align_corners=False)


def siamese(images: Tensor, u: list[float]) -> Tensor:
    """DSA's mode S on normalised square images: one operation, with one draw u, for all of them.

    u: quantiles of choice, brightness, saturation, contrast, crop y and x, cutout y and x, flip,
    scale x and y, and rotation; strengths are DSA's published ones.
    """
    size = images.shape[-1]
    match ("color", "crop", "cutout", "flip", "scale", "rotate")[int(6 * u[0])]:
        case "color":
            images = images + (u[1] - 0.5)
            mean = images.mean(1, keepdim=True)
            images = mean + 2 * u[2] * (images - mean)
            mean = images.mean((1, 2, 3), keepdim=True)
            return mean + (0.5 + u[3]) * (images - mean)
        case "crop":
            border = int(size / 8 + 0.5)
            top, left = (int(q * (2 * border + 1)) for q in u[4:6])
            padded = F.pad(images, (border,) * 4)
            return padded[:, :, top : top + size, left : left + size]
        case "cutout":
            side = int(size / 2 + 0.5)
            mask = torch.ones_like(images)
            top, left = (int(q * (size + 1 - side % 2)) - side // 2 for q in u[6:8])
            mask[:, :, max(0, top) : top + side, max(0, left) : left + side] = 0
            return images * mask
        case "flip":
            return images.flip(3) if u[8] < 0.5 else images
        case "scale":
            x, y = (1 / 1.2 + q * (1.2 - 1 / 1.2) for q in u[9:11])
            return _affine(images, [[x, 0, 0], [0, y, 0]])
        case _:
            angle = (2 * u[11] - 1) * math.radians(15)
            cos, sin = math.cos(angle), math.sin(angle)
            return _affine(images, [[cos, -sin, 0], [sin, cos, 0]])


def _affine(images: Tensor, matrix: list[list[float]]) -> Tensor:
    theta = images.new_tensor(matrix).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def plain(model: Classifier) -> Classifier:
    """The network, in place, in PyTorch's own layers."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, AveragePool):
                setattr(parent, name, nn.AvgPool2d(2))
    return model


class ReferenceLoop:
    """The loop over `distiller`'s classes, at its settings and with its random draws.

    It takes nothing else from it: the images and psi here are copies.
    """

    def __init__(self, distiller: Distiller, model: Classifier, weights: Path) -> None:
        """`weights` holds pairs of state dicts, <n>.pt = (initial, trained); `model` is a network
        of that kind, its parameters trainable as a network's are.
        """
        self.like, self.weights = distiller, weights
        self.model = plain(model).eval().to(distiller.device)
        self.images = {c: nn.Parameter(p.detach().clone()) for c, p in distiller.images.items()}
        cfg = distiller.config
        self.optimizer = torch.optim.AdamW(
            self.images.values(), lr=cfg.lr, weight_decay=cfg.weight_decay
        )
        self.psi = type(distiller.frequencies.sampler)(
            distiller.frequencies.config, model.num_features
        )
        self.psi.to(distiller.device).load_state_dict(distiller.frequencies.sampler.state_dict())
        self.psi_optimizer = (
            torch.optim.Adam(
                self.psi.parameters(), lr=distiller.frequencies.config.lr, maximize=True
            )
            if isinstance(self.psi, ScaleMixture)
            else None
        )
        self.step = 0

    def _generator(self, purpose: str, *keys: int) -> torch.Generator:
        return keyed_generator(self.like.seed, purpose, self.step, *keys)

    def _load(self, purpose: tuple[float, float]) -> Classifier:
        low, high = purpose
        generator = self._generator("extractor")
        member = int(torch.randint(len(self.like.pool), (), generator=generator))
        beta = low + (high - low) * float(torch.rand((), generator=generator))
        initial, trained = torch.load(self.weights / f"{member}.pt", map_location=self.like.device)
        self.model.load_state_dict({k: initial[k].lerp(trained[k], beta) for k in initial})
        return self.model

    def _features(self, images: Tensor) -> Tensor:
        return F.normalize(self.model.features(images), dim=1)

    def update(self, real: Mapping[int, Tensor]) -> dict[str, float]:
        """One step; the same metrics as Distiller.update, as numbers."""
        cfg, like = self.like.config, self.like
        self._load(cfg.blend)
        draws = [
            torch.rand(12, generator=self._generator("augment", c), dtype=torch.float64).tolist()
            for c in self.images
        ]
        mean, std = (
            torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
            for values in (like.spec.mean, like.spec.std)
        )
        metrics: dict[str, float] = {}
        self.optimizer.zero_grad()

        def augmented(images: Tensor, group: int) -> Tensor:
            return siamese((images - mean) / std, draws[group])

        def add(name: str, value: Tensor) -> None:
            metrics[name] = metrics.get(name, 0.0) + value.item()

        generator = keyed_generator(like.seed, "frequencies", self.step, 0, device=like.device)
        t = self.psi(generator).to(like.dtype)
        psi_gradients = []
        for group, c in enumerate(self.images):
            with torch.no_grad():
                batch = real[c].to(like.device).float() / 255
                x = self._features(augmented(batch.to(like.dtype), group))
            y = self._features(augmented(tiles(self.images[c], like.factor), group))
            loss = discrepancy(x, y, t)
            add("ncfd", loss)
            (cfg.loss_weight * loss).backward(retain_graph=self.psi_optimizer is not None)
            if self.psi_optimizer is None:
                continue
            images_gradient = self.images[c].grad
            self.psi_optimizer.zero_grad()
            value = psi_objective(x, y, t, like.frequencies.config.objective)
            add("psi_objective", value)
            self.images[c].grad = None
            value.backward(retain_graph=True)  # once more through the whole graph; t has others
            self.images[c].grad = images_gradient
            psi_gradients.append([p.grad for p in self.psi.parameters()])
            self.psi_optimizer.zero_grad()  # lets go of them: the next class must not add to these
            del x, y, loss, value  # and the graph, before the next class makes its own
        if self.psi_optimizer is not None:
            for parameter, *grads in zip(self.psi.parameters(), *psi_gradients, strict=True):
                parameter.grad = torch.stack(grads).mean(0)
            self.psi_optimizer.step()
        if cfg.calibration:
            self._load((1.0, 1.0))
            for group, c in enumerate(self.images):
                images = augmented(tiles(self.images[c], like.factor), group)
                loss = F.cross_entropy(
                    self.model(images), torch.full((len(images),), c, device=like.device)
                )
                add("calibration", loss)
                (cfg.calibration * loss).backward()
        self.optimizer.step()
        with torch.no_grad():
            for images in self.images.values():
                images.clamp_(0, 1)
        self.step += 1
        return metrics
