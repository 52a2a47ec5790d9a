"""The pool of feature extractors: pairs (initial, trained) of one architecture, and their blends.

A step's extractor is lerp(initial, trained, beta) of one pool member. All weights of a network live
in one flat buffer that the module's tensors are views of, so a blend is a single fused lerp in
memory: no disk, and the (possibly compiled) module never changes identity.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ncfm.kernels import NativeConvNet, native
from ncfm.models import Classifier

State = Mapping[str, Tensor]


class ExtractorPool:
    """P networks of one architecture, each as its initial and its trained weights."""

    def __init__(
        self,
        model: Classifier,
        states: Sequence[tuple[State, State]],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """`states` holds (initial, trained) state dicts of `model`; raises ValueError if there is
        none.
        """
        if not states:
            raise ValueError("an extractor pool needs at least one network")
        self.model = model.to(device).eval().requires_grad_(False)
        self._names = [k for k, v in self.model.state_dict().items() if v.is_floating_point()]
        self._initial = torch.stack([self._flatten(initial) for initial, _ in states]).to(device)
        self._trained = torch.stack([self._flatten(trained) for _, trained in states]).to(device)
        self._flat = self._initial[0].clone()
        self._point_into(self._flat)
        self._frozen: NativeConvNet | None = None

    def __len__(self) -> int:
        return len(self._initial)

    def _flatten(self, state: State) -> Tensor:
        return torch.cat([state[name].detach().reshape(-1) for name in self._names])

    def _point_into(self, flat: Tensor) -> None:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        offset = 0
        for name in self._names:
            tensor = tensors[name]
            tensor.data = flat[offset : offset + tensor.numel()].view_as(tensor)
            offset += tensor.numel()

    def to(self, dtype: torch.dtype) -> None:
        """Change the precision of the model's weights; they are blended in float32 or better. The
        module alone must not be converted: its tensors would no longer be views of what a blend
        writes.
        """
        blended = torch.promote_types(dtype, torch.float32)
        self._initial, self._trained = self._initial.to(blended), self._trained.to(blended)
        self._flat = self._flat.to(dtype)
        self._point_into(self._flat)

    def freeze(self) -> NativeConvNet | None:
        """The model's features by kernels of our own, which follow every blend; None where there
        are none for it.
        """
        self._frozen = native(self.model)
        return self._frozen

    def blend(self, index: int, beta: float) -> Classifier:
        """The model with the weights lerp(initial, trained, beta) of one member, buffers blended
        too.
        """
        self._flat.copy_(torch.lerp(self._initial[index], self._trained[index], beta))
        if self._frozen is not None:
            self._frozen.refresh()
        return self.model

    def draw(
        self, generator: torch.Generator, between: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[int, float]:
        """A member, and beta uniform between two numbers."""
        index = int(torch.randint(len(self), (), generator=generator))
        low, high = between
        return index, low + (high - low) * float(torch.rand((), generator=generator))
