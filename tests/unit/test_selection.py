"""Easy and confident images, and images spread over a class."""

from dataclasses import replace

import pytest
import torch
from test_extractors import network, states
from torch import Tensor

from ncfm.communication import Communicator
from ncfm.distill import DistillConfig
from ncfm.extractors import ExtractorPool
from ncfm.formation import decode, encode
from ncfm.images import ImageSpec
from ncfm.models import ModelConfig, build_model
from ncfm.selection import NETWORKS, class_features, easiest, easy_count, image_losses, spread
from ncfm.synthetic import SyntheticConfig
from pipeline.data.selection import Selection

SPEC = ImageSpec(
    channels=3, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b", "c")
)


def some_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def losses_by_hand(images: Tensor, label: int, members: int) -> Tensor:
    total = torch.zeros(len(images))
    for _, trained in states(3)[:members]:
        model = network(0)
        model.load_state_dict(trained)
        with torch.no_grad():
            logits = model((images / 255 - 0.5) / 0.25)
        target = torch.full((len(images),), label)
        total += torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return total / members


@pytest.mark.parametrize(("networks", "members"), [(2, 2), (3, 3), (20, 3)])
def test_the_losses_are_those_of_the_trained_networks(networks: int, members: int) -> None:
    pool, images = ExtractorPool(network(7), states(3)), some_images(300)  # more than a chunk
    found = image_losses(pool, images, 1, SPEC, networks)
    torch.testing.assert_close(found.float(), losses_by_hand(images, 1, members))
    assert not torch.allclose(found, image_losses(pool, images, 2, SPEC, networks))


def test_native_kernels_say_the_same() -> None:
    config = ModelConfig(depth=2, width=16)
    models = [
        build_model(config, num_classes=3, channels=3, image_size=8, seed=seed) for seed in range(3)
    ]
    pool = ExtractorPool(models[0], [(models[1].state_dict(), models[2].state_dict())])
    images = some_images(20)
    with torch.no_grad():
        inputs = (images / 255 - 0.5) / 0.25
        expected = -models[2](inputs).log_softmax(1)[:, 2]
        features = torch.nn.functional.normalize(models[2].features(inputs))
    torch.testing.assert_close(
        image_losses(pool, images, 2, SPEC, 4).float(), expected, rtol=1e-4, atol=1e-5
    )
    found = class_features(pool, images, SPEC).float()
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


def test_the_easiest() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0])
    assert easiest(losses, 3).tolist() == [1, 3, 2]
    assert easiest(losses, 9).tolist() == [1, 3, 2, 0, 4]
    assert [easy_count(n, f) for n, f in ((10, 0.5), (11, 0.5), (1, 0.01), (0, 0.5), (7, 1.0))] == [
        *(5, 6, 1, 0, 7)
    ]


def test_one_of_every_blob() -> None:
    """Five blobs of unequal size, far from each other: one sample of each, the most central."""
    generator = torch.Generator().manual_seed(0)
    sizes = (50, 20, 10, 5, 2)
    centres = 20 * torch.eye(5, dtype=torch.float64)
    labels = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    x = centres[labels] + 0.1 * torch.randn(87, 5, generator=generator, dtype=torch.float64)
    for seed in range(5):
        chosen = spread(x, 5, torch.Generator().manual_seed(seed))
        assert sorted(labels[chosen].tolist()) == [0, 1, 2, 3, 4]
        for index in chosen.tolist():
            blob = x[labels == labels[index]]
            distances = (blob - blob.mean(0)).norm(dim=1)
            own = (x[index] - blob.mean(0)).norm()
            assert float(own) == pytest.approx(float(distances.min()))
    random = torch.randperm(87, generator=generator)[:5]  # negative control
    assert len(set(labels[random].tolist())) < 5


def test_as_many_as_there_are() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    assert sorted(spread(x, 6, torch.Generator().manual_seed(0)).tolist()) == list(range(6))
    same = torch.ones(4, 3, dtype=torch.float64)
    assert sorted(spread(same, 3, torch.Generator().manual_seed(0)).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot choose 7 of 6"):
        spread(x, 7, torch.Generator())


class Batches:
    """What a `Selection` needs of the batches: a class's images."""

    def __init__(self, images: Tensor) -> None:
        self._images, self.kept = images, torch.arange(len(images))

    def images(self, class_index: int) -> Tensor:
        return self._images

    def allowed(self, class_index: int) -> Tensor:
        return self.kept

    def restrict(self, class_index: int, allowed: Tensor) -> None:
        self.kept = allowed


class Member:
    """A member of a group of two. The sum is what the first member gave."""

    members = 2

    def __init__(self, member: int, log: list[Tensor]) -> None:
        self.member, self.log = member, log

    def sum_group(self, tensor: Tensor) -> Tensor:
        if self.member == 0:
            self.log.append(tensor.clone())
            return tensor
        assert not tensor.any()
        return self.log.pop(0)


def select(images: Tensor, communicator: Communicator, **changes: object) -> Selection:
    return Selection(
        batches=Batches(images),  # type: ignore[arg-type]
        pool=ExtractorPool(network(7), states(3)),
        spec=SPEC,
        synthetic=replace(SyntheticConfig(), **{k: changes[k] for k in changes if k == "choose"}),  # type: ignore[arg-type]
        distill=DistillConfig(easy_fraction=changes.get("easy_fraction", 1.0)),  # type: ignore[arg-type]
        ipc=(2, 2),
        seed=0,
        communicator=communicator,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("choose", ["confident", "spread"])
def test_members_of_a_group_agree(choose: str) -> None:
    """The first chooses; easy images alone are started from."""
    images, log = some_images(40), list[Tensor]()
    made = []
    for member in (0, 1):
        communicator: Communicator = Member(member, log)  # type: ignore[assignment]
        selection = select(images, communicator, choose=choose, easy_fraction=0.5)
        selection.restrict(1)
        easy = losses_by_hand(images, 1, min(3, NETWORKS)).argsort()[:20].sort().values
        assert torch.equal(selection.batches.allowed(1), easy)
        made.append(selection.initial_images(1))
    assert torch.equal(*made)
    assert log == []
    allowed = encode_each(images[easy])
    assert all(is_one_of(tile, allowed) for tile in tiles(made[0]))
    if choose == "confident":
        best = losses_by_hand(images, 1, 3).argsort()[:8]
        torch.testing.assert_close(made[0], encode(images[best] / 255, 2))


def encode_each(images: Tensor) -> list[Tensor]:
    """Every image as the tile that it becomes, at full size again."""
    return [decode(encode((image / 255).expand(4, -1, -1, -1), 2), 2)[0] for image in images]


def tiles(stored: Tensor) -> Tensor:
    return decode(stored, 2)


def is_one_of(tile: Tensor, many: list[Tensor]) -> bool:
    return any(torch.allclose(tile, other, atol=1e-5) for other in many)


def test_a_choice_needs_real_images() -> None:
    with pytest.raises(ValueError, match="got 'spread'"):
        SyntheticConfig(init="noise", choose="spread")
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"got {fraction}"):
            DistillConfig(easy_fraction=fraction)
