"""The optimiser of the synthetic images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ncfm.distill_config import DistillConfig
from ncfm.training_state import load_optimizer_state, optimizer_state


class ImageOptimizer:
    """AdamW or SGD on the stored images of some classes, which stay in [0, 1].

    Both are elementwise, and every class is stepped exactly once a step: the state of a class is
    its own.
    """

    def __init__(self, images: Mapping[int, nn.Parameter], config: DistillConfig) -> None:
        self.images, self.config, params = images, config, list(images.values())
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
        else:
            self.optimizer = torch.optim.AdamW(
                params, lr=config.lr, weight_decay=config.weight_decay
            )

    def step(self, gradients: Sequence[Tensor | None], lr: float) -> None:
        """Clip each class's gradient, (ipc, C, H, W), and step all images at this learning rate."""
        for parameter, gradient in zip(self.images.values(), gradients, strict=True):
            parameter.grad = gradient
            # Class by class: what a class does must not depend on which others share its worker.
            if self.config.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameter, self.config.clip_grad_norm)
            if self.config.clip_grad_value is not None:
                nn.utils.clip_grad_value_(parameter, self.config.clip_grad_value)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter in self.images.values():
                parameter.clamp_(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Images and optimiser state of each class, flat: `class/<index>/...`."""
        state: dict[str, Tensor] = {}
        for c, parameter in self.images.items():
            state[f"class/{c}/images"] = parameter.detach()
            state |= optimizer_state(self.optimizer, parameter, f"class/{c}/optimizer/")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state; it may hold more classes. Raises KeyError if one is missing."""
        for c, parameter in self.images.items():
            with torch.no_grad():
                parameter.copy_(state[f"class/{c}/images"])
            load_optimizer_state(self.optimizer, parameter, state, f"class/{c}/optimizer/")
