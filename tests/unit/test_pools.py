"""Pools of several architectures: each step is that of a pool of the drawn network's alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSpec
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator
from pipeline.stages.pretrain import PretrainConfig

SPEC = ImageSpec(
    channels=3, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b")
)
CONVNET, TIMM = ModelConfig(depth=2, width=16), ModelConfig(name="timm/test_resnet")


def network(model: ModelConfig, seed: int = 0) -> Classifier:
    return build_model(model, num_classes=2, channels=3, image_size=16, seed=seed)


def pool(*models: ModelConfig) -> ExtractorPool:
    """Two members, one for each of the models, or both of the only one."""
    members = [models[member % len(models)] for member in range(2)]
    states = [
        [network(model, 10 * member + end).state_dict() for end in (1, 2)]
        for member, model in enumerate(members)
    ]
    return ExtractorPool([network(model) for model in models], states)


def distiller(
    pool: ExtractorPool, seed: int, *, precision: Any = "float32", **frequencies: Any
) -> Distiller:
    images = {c: torch.rand(1, 3, 16, 16, generator=keyed_generator(c, "x")) for c in range(2)}
    return Distiller(
        images,
        factor=1,
        spec=SPEC,
        pool=pool,
        seed=seed,
        config=DistillConfig(num_steps=4, real_batch=8, calibration=1.0, precision=precision),
        frequencies=FrequencyConfig(num_freqs=64, num_components=4, **frequencies),
        augment=AugmentConfig(),
    )


def updated(distiller: Distiller) -> Tensor:
    generator = keyed_generator(0, "real")
    distiller.update({c: torch.rand(8, 3, 16, 16, generator=generator) for c in range(2)})
    return torch.cat([distiller.images[c].detach().clone() for c in range(2)])


def drawn_member(seed: int) -> int:
    return pool(CONVNET).draw(keyed_generator(seed, "extractor", 0))[0]


def test_a_step_is_that_of_a_pool_of_the_drawn_architecture() -> None:
    for member, own, other in ((0, CONVNET, TIMM), (1, TIMM, CONVNET)):
        seed = next(seed for seed in range(20) if drawn_member(seed) == member)
        mixed = updated(distiller(pool(CONVNET, TIMM), seed))
        assert torch.equal(mixed, updated(distiller(pool(own), seed)))
        assert not torch.allclose(mixed, updated(distiller(pool(other), seed)))


def test_blends_of_the_members_leave_each_other_alone() -> None:
    mixed = pool(CONVNET, TIMM)
    first = {k: v.clone() for k, v in mixed.blend(0, 0.5).state_dict().items()}
    mixed.blend(1, 0.5)
    assert all(torch.equal(v, first[k]) for k, v in mixed.models[0].state_dict().items())
    expected = network(TIMM, 12).eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(mixed.blend(1, 1.0).features(x), expected.features(x))


@pytest.mark.parametrize("per_network", [True, False])
def test_every_architecture_has_a_psi_of_its_dimension(per_network: bool) -> None:
    mixed = pool(CONVNET, TIMM)
    made = distiller(mixed, 0, sampler="psi", per_network=per_network)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for _ in range(4):
        updated(made)
    again = distiller(pool(CONVNET, TIMM), 0, sampler="psi", per_network=per_network)
    again.load_state_dict(made.state_dict())
    assert torch.equal(updated(again), updated(made))
    for member, model in enumerate(mixed.models):
        made.frequencies.choose(member)
        assert made.frequencies.draw(0, 0)[0].shape == (64, model.num_features)
        names = [k for k in before if k.startswith(f"psi/{member}.")]
        assert any(not torch.equal(before[k], made.state_dict()[k]) for k in names)


def test_wrong_pools() -> None:
    with pytest.raises(
        ValueError, match=r"at most as many as networks, got \['convnet', 'vgg11'\]"
    ):
        PretrainConfig(networks=1, models=("convnet", "vgg11"))
    with pytest.raises(ValueError, match="got 'resnet19'"):
        PretrainConfig(models=("convnet", "resnet19"))


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_convnext", "torchvision/resnet18"])
def test_networks_of_the_libraries_take_a_step_in_low_precision(name: str) -> None:
    """What a GPU does by `precision bfloat16`: the network alone, the rest is float32."""
    single, low = (
        distiller(pool(ModelConfig(name=name)), 0, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    start, moved, moved_low = single.images[0].detach().clone(), updated(single), updated(low)
    assert moved_low.dtype == torch.float32
    assert not torch.equal(moved, moved_low)  # negative control
    assert {v.dtype for v in low.pool.models[0].state_dict().values() if v.is_floating_point()} == {
        torch.bfloat16
    }
    changes = [(m[: len(start)] - start).sign() for m in (moved, moved_low)]
    assert (changes[0] == changes[1]).float().mean() > 0.8
