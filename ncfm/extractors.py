"""The pool of feature extractors: snapshots of the training of some networks of one architecture.

A step's extractor is lerp(first, second, beta) of two snapshots of one member: its initial and its
trained weights (the paper's), a single snapshot, or any two. All weights of a network live in one
flat buffer that the module's tensors are views of, so a blend is a single fused lerp in memory: no
disk, and the (possibly compiled) module never changes identity.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ncfm.backend.kernels import NativeConvNet, native
from ncfm.models import Classifier

State = Mapping[str, Tensor]
ExtractorKind = Literal["blend", "snapshot", "snapshot_blend"]


class Blend(NamedTuple):
    """The weights lerp(snapshot `first`, snapshot `second`, beta) of a member."""

    member: int
    beta: float
    first: int = 0
    second: int = -1


class ExtractorPool:
    """P networks of one architecture, each as the snapshots of its training, in their order."""

    def __init__(
        self,
        model: Classifier,
        trajectories: Sequence[Sequence[State]],
        *,
        epochs: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`trajectories` holds state dicts of `model` for each network: the initial one, any in
        between, the trained one. `epochs` says after how many epochs of training each was taken;
        by default after 0, 1, 2, ... Raises ValueError if there is no network, or if the networks
        do not have the same number of snapshots.
        """
        if not trajectories:
            raise ValueError("an extractor pool needs at least one network")
        self.epochs = tuple(range(len(trajectories[0])) if epochs is None else epochs)
        if counts := sorted({len(states) for states in trajectories} - {len(self.epochs)}):
            raise ValueError(
                f"every network must have {len(self.epochs)} snapshots, one for each of the epochs "
                f"{self.epochs}, got {counts}"
            )
        if len(self.epochs) < 2 or sorted(set(self.epochs)) != list(self.epochs):
            raise ValueError(f"epochs must be at least two rising numbers, got {self.epochs}")
        self.model = model.to(device).eval().requires_grad_(False)
        self._names = [k for k, v in self.model.state_dict().items() if v.is_floating_point()]
        self._snapshots = torch.stack(
            [torch.stack([self._flatten(state) for state in states]) for states in trajectories]
        ).to(device)  # (P, snapshots, weights)
        self._flat = self._snapshots[0, 0].clone()
        self._point_into(self._flat)
        self._native: NativeConvNet | None = None

    def __len__(self) -> int:
        return len(self._snapshots)

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
        self._snapshots = self._snapshots.to(torch.promote_types(dtype, torch.float32))
        self._flat = self._flat.to(dtype)
        self._point_into(self._flat)

    def native_features(self) -> NativeConvNet | None:
        """Native forward pass, kept in sync with `blend`; None if the model has none."""
        self._native = native(self.model)
        return self._native

    def blend(self, member: int, beta: float, first: int = 0, second: int = -1) -> Classifier:
        """The model with the weights lerp(first, second, beta) of two snapshots of a member (by
        default its initial and its trained weights), buffers blended too.
        """
        snapshots = self._snapshots[member]
        self._flat.copy_(torch.lerp(snapshots[first], snapshots[second], beta))
        if self._native is not None:
            self._native.refresh()
        return self.model

    def draw(
        self, generator: torch.Generator, between: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[int, float]:
        """A member, and beta uniform between two numbers."""
        index = int(torch.randint(len(self), (), generator=generator))
        low, high = between
        return index, low + (high - low) * float(torch.rand((), generator=generator))

    def draw_step(
        self,
        generator: torch.Generator,
        kind: ExtractorKind = "blend",
        between: tuple[float, float] = (0.0, 1.0),
        ahead: tuple[int, int] | None = None,
    ) -> tuple[Blend, Blend]:
        """The extractor of a step, and the classifier whose cross-entropy the step takes.

        `blend`: between the initial and the trained weights of a member; `snapshot`: one of all its
        snapshots; `snapshot_blend`: between two of them, the later one second. The classifier is
        the trained network, or, with `ahead`, the snapshot of a number of epochs uniform in
        `ahead` later than the extractor's (its second one's): the first one that is no earlier than
        that, or the last.
        """
        member, beta = self.draw(generator, between)
        extractor, last = Blend(member, beta), len(self.epochs) - 1
        if kind != "blend":
            one, other = torch.randint(last + 1, (2,), generator=generator).tolist()
            extractor = (
                Blend(member, 0.0, one, one)
                if kind == "snapshot"
                else Blend(member, beta, min(one, other), max(one, other))
            )
        classifier = Blend(member, 1.0)
        if ahead is not None:
            epoch = self.epochs[extractor.second]
            epoch += int(torch.randint(ahead[0], ahead[1] + 1, (), generator=generator))
            later = next((i for i, e in enumerate(self.epochs) if e >= epoch), last)
            classifier = Blend(member, 0.0, later, later)
        return extractor, classifier
