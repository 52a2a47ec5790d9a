"""The pool of feature extractors: snapshots of the training of some networks.

A step's extractor is lerp(first, second, beta) of two snapshots of one member: its initial and its
trained weights (the paper's), a single snapshot, or any two. All weights of a network live in one
flat buffer that the module's tensors are views of, so a blend is a single fused lerp in memory: no
disk, and the (possibly compiled) module never changes identity.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

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


class _Blended:
    """A module whose weights are views of one flat buffer."""

    def __init__(self, model: Classifier, device: torch.device | str) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.names = [k for k, v in model.state_dict().items() if v.is_floating_point()]
        self.native: NativeConvNet | None = None
        self.point_into(self.flatten(model.state_dict()))

    def flatten(self, state: State) -> Tensor:
        return torch.cat([state[name].detach().reshape(-1) for name in self.names])

    def point_into(self, flat: Tensor) -> None:
        self.flat, offset = flat, 0
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name in self.names:
            tensor = tensors[name]
            tensor.data = flat[offset : offset + tensor.numel()].view_as(tensor)
            offset += tensor.numel()


class ExtractorPool:
    """P networks, each as the snapshots of its training, in their order.

    With several architectures, member i has number i modulo their number.
    """

    def __init__(
        self,
        models: Classifier | Sequence[Classifier],
        trajectories: Sequence[Sequence[State]],
        *,
        epochs: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`models` has a module of every architecture. `trajectories` holds state dicts of its
        module for each network: the initial one, any in between, the trained one. `epochs` says
        after how many epochs of training each was taken; by default after 0, 1, 2, ... Raises
        ValueError if there is no network, or if the networks do not have the same number of
        snapshots.
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
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        self._blended = [_Blended(model, device) for model in self.models]
        self._snapshots = [
            torch.stack([self._of(member).flatten(state) for state in states]).to(device)
            for member, states in enumerate(trajectories)
        ]  # of each member (snapshots, weights)

    def __len__(self) -> int:
        return len(self._snapshots)

    def _of(self, member: int) -> _Blended:
        return self._blended[member % len(self._blended)]

    def to(self, dtype: torch.dtype) -> None:
        """Change the precision of the models' weights; they are blended in float32 or better. A
        module alone must not be converted: its tensors would no longer be views of what a blend
        writes.
        """
        kept = torch.promote_types(dtype, torch.float32)
        self._snapshots = [snapshots.to(kept) for snapshots in self._snapshots]
        for blended in self._blended:
            blended.point_into(blended.flat.to(dtype))

    def native_features(self, model: int = 0) -> NativeConvNet | None:
        """Native forward pass of a model, kept in sync with `blend`; None if it has none."""
        blended = self._blended[model]
        blended.native = native(blended.model)
        return blended.native

    def blend(self, member: int, beta: float, first: int = 0, second: int = -1) -> Classifier:
        """The member's model with the weights lerp(first, second, beta) of two of its snapshots (by
        default its initial and its trained weights), buffers blended too.
        """
        snapshots, blended = self._snapshots[member], self._of(member)
        blended.flat.copy_(torch.lerp(snapshots[first], snapshots[second], beta))
        if blended.native is not None:
            blended.native.refresh()
        return blended.model

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
