"""The paper's own loop, as one would write it from the paper: what bench_step.py compares with.

One class at a time, float32, eager; the network's weights, blended, are read from disk each step;
the real features without a graph, as in the released code; psi's gradient by a second backward
through the whole graph, that of the extractor included. Beyond the paper, as here: psi ascends
`psi_objective`, once a step, and every class's images take one optimiser step. As in the released
code, psi ascends on the frequencies that the images descend at.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfm.augment import Augment
from ncfm.discrepancy import empirical_cf
from ncfm.distill import Distiller
from ncfm.formation import decode
from ncfm.frequencies import ScaleMixture, psi_objective
from ncfm.models import Classifier
from ncfm.models.layers import AveragePool
from ncfm.seeding import keyed_generator


def discrepancy(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Eq. 7 at alpha = 0.5, from the definition: mean_k sqrt(|phi_X(t_k) - phi_Y(t_k)|^2 / 2)."""
    angles_x, angles_y = x @ t.T, y @ t.T
    real = angles_x.cos().mean(0) - angles_y.cos().mean(0)
    imag = angles_x.sin().mean(0) - angles_y.sin().mean(0)
    return ((real.square() + imag.square()) / 2 + 1e-24).sqrt().mean()


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
        self.psi = type(distiller.sampler)(distiller.frequencies, model.num_features)
        self.psi.to(distiller.device).load_state_dict(distiller.sampler.state_dict())
        self.psi_optimizer = (
            torch.optim.Adam(self.psi.parameters(), lr=distiller.frequencies.lr, maximize=True)
            if isinstance(self.psi, ScaleMixture)
            else None
        )
        self.augment: Augment = distiller.augment
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
        draws = self.augment.draw([self._generator("augment", c) for c in self.images])
        metrics: dict[str, float] = {}
        self.optimizer.zero_grad()

        def augmented(images: Tensor, group: int) -> Tensor:
            index = torch.full((len(images),), group)
            return self.augment.apply(like.spec.normalize(images), draws, index)

        def add(name: str, value: Tensor) -> None:
            metrics[name] = metrics.get(name, 0.0) + value.item()

        generator = keyed_generator(like.seed, "frequencies", self.step, 0, device=like.device)
        t = self.psi(generator).to(like.dtype)
        psi_gradients = []
        for group, c in enumerate(self.images):
            with torch.no_grad():
                batch = real[c].to(like.device).float() / 255
                x = self._features(augmented(batch.to(like.dtype), group))
            y = self._features(augmented(decode(self.images[c], like.factor), group))
            loss = discrepancy(x, y, t)
            add("ncfd", loss)
            (cfg.loss_weight * loss).backward(retain_graph=self.psi_optimizer is not None)
            if self.psi_optimizer is None:
                continue
            images_gradient = self.images[c].grad
            self.psi_optimizer.zero_grad()
            value = psi_objective(
                empirical_cf(x, t), empirical_cf(y, t), len(x), len(y), like.frequencies, cfg.alpha
            )
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
                images = augmented(decode(self.images[c], like.factor), group)
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
