"""Files of a pool of networks: one per member, with its snapshots and metric rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from ncfm.images import ImageSpec
from ncfm.models import Classifier, ModelConfig, build_model

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool of trained networks, which have the architectures in turn."""

    directory: UPath
    models: tuple[ModelConfig, ...]
    networks: int

    def model(self, member: int) -> ModelConfig:
        """The architecture of a member."""
        return self.models[member % len(self.models)]

    def trained(self, member: int, spec: ImageSpec) -> Classifier:
        """A member's trained network."""
        network = new_network(self.model(member), spec, seed=0)  # weights are loaded below
        network.load_state_dict(load_member(self.directory, member)[1])
        return network

    def teachers(self, count: int, spec: ImageSpec) -> Iterator[Classifier]:
        """The first `count` trained networks, or all if there are fewer."""
        return (self.trained(member, spec) for member in range(min(count, self.networks)))


def new_network(model: ModelConfig, spec: ImageSpec, seed: int) -> Classifier:
    """Build a network for these images, with initial weights from the seed."""
    return build_model(
        model,
        num_classes=spec.num_classes,
        channels=spec.channels,
        image_size=spec.image_size,
        seed=seed,
    )


def metrics_path(directory: UPath, member: int) -> UPath:
    """Path of a member's training metrics, one row per epoch."""
    return directory / f"metrics-{member:03d}.jsonl"


def member_path(directory: UPath, member: int) -> UPath:
    """Path of a member's initial and trained weights."""
    return directory / f"network-{member:03d}.safetensors"


def snapshot_path(directory: UPath, member: int, epoch: int) -> UPath:
    """Path of a member's weights after an intermediate epoch."""
    return directory / f"snapshot-{member:03d}-{epoch:04d}.safetensors"


def contiguous(state: Mapping[str, Tensor]) -> State:
    """Contiguous tensors, as safetensors requires."""
    return {name: value.contiguous() for name, value in state.items()}


def pack_member(initial: State, trained: State) -> bytes:
    """The initial and trained states as one safetensors file."""
    return save(
        {
            f"{prefix}/{name}": value.contiguous()
            for prefix, state in (("initial", initial), ("trained", trained))
            for name, value in state.items()
        }
    )


def load_member(directory: UPath, member: int) -> tuple[State, State]:
    """Load the (initial, trained) states of a member."""
    tensors = load(member_path(directory, member).read_bytes())
    initial, trained = (
        {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("initial", "trained")
    )
    return initial, trained


def load_trajectory(directory: UPath, member: int, epochs: Sequence[int]) -> list[State]:
    """Load the states of a member after these epochs, from 0 to the last."""
    initial, trained = load_member(directory, member)
    between = (snapshot_path(directory, member, epoch).read_bytes() for epoch in epochs[1:-1])
    return [initial, *map(load, between), trained]
