"""The files of a pool of networks: one a member, with its snapshots and rows of metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from ncfm.images import ImageSpec
from ncfm.models import ModelConfig, build_model

State = dict[str, Tensor]


def new_network(model: ModelConfig, spec: ImageSpec, seed: int) -> Any:
    """A network of this architecture for these images, its initial weights from the seed."""
    return build_model(
        model,
        num_classes=spec.num_classes,
        channels=spec.channels,
        image_size=spec.image_size,
        seed=seed,
    )


def metrics_path(directory: UPath, member: int) -> UPath:
    """The rows of the training of one network of the pool, an epoch each."""
    return directory / f"metrics-{member:03d}.jsonl"


def member_path(directory: UPath, member: int) -> UPath:
    """The file of one network of the pool."""
    return directory / f"network-{member:03d}.safetensors"


def snapshot_path(directory: UPath, member: int, epoch: int) -> UPath:
    """The file of a network's weights after so many epochs, neither its first nor its last."""
    return directory / f"snapshot-{member:03d}-{epoch:04d}.safetensors"


def contiguous(state: Mapping[str, Tensor]) -> State:
    """The tensors as safetensors takes them."""
    return {name: value.contiguous() for name, value in state.items()}


def pack_member(initial: State, trained: State) -> bytes:
    """Both states of a network as one safetensors file."""
    return save(
        {
            f"{kind}/{name}": value.contiguous()
            for kind, state in (("initial", initial), ("trained", trained))
            for name, value in state.items()
        }
    )


def load_member(directory: UPath, member: int) -> tuple[State, State]:
    """The (initial, trained) states of one network of the pool."""
    tensors = load(member_path(directory, member).read_bytes())
    initial, trained = (
        {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(kind)}
        for kind in ("initial", "trained")
    )
    return initial, trained


def load_trajectory(directory: UPath, member: int, epochs: Sequence[int]) -> list[State]:
    """The states of one network of the pool after these epochs, from 0 to the last."""
    initial, trained = load_member(directory, member)
    between = (snapshot_path(directory, member, epoch).read_bytes() for epoch in epochs[1:-1])
    return [initial, *map(load, between), trained]
