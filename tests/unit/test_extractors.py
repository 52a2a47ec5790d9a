"""The pool of extractors: what a blend is, and what it leaves alone."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from ncfm.extractors import ExtractorPool
from ncfm.models import Classifier, ModelConfig, build_model

MODEL = ModelConfig(depth=2, width=4, norm="batch")  # batch norm: float and integer buffers


def network(seed: int) -> Classifier:
    model = build_model(MODEL, num_classes=3, channels=3, image_size=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) - 0.5)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def states(count: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return [(network(i).state_dict(), network(100 + i).state_dict()) for i in range(count)]


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_blend_computes_what_a_network_of_these_weights_does(
    beta: float, dtype: torch.dtype, images: Tensor
) -> None:
    pool = ExtractorPool(network(7), states(3))
    pool.to(dtype)
    initial, trained = states(3)[2]
    expected = network(8).to(dtype)
    expected.load_state_dict(
        {
            k: v.to(dtype).lerp(trained[k].to(dtype), beta) if v.is_floating_point() else v
            for k, v in initial.items()
        }
    )
    pool.blend(0, 0.9)  # the blend before leaves no trace
    blended = pool.blend(2, beta)
    x = images.to(dtype)
    torch.testing.assert_close(blended.features(x), expected.features(x))
    torch.testing.assert_close(blended(x), expected(x))
    assert not torch.allclose(blended(x), pool.blend(1, beta)(x))  # negative control


def test_the_module_and_its_memory_stay_the_same() -> None:
    """A compiled module, or one whose weights are pinned, survives every blend."""
    model = network(7)
    pool = ExtractorPool(model, states(2))
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for index, beta in ((0, 0.2), (1, 0.7)):
        assert pool.blend(index, beta) is model
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places


def test_the_given_states_are_left_alone() -> None:
    given, kept = states(2), states(2)
    pool = ExtractorPool(network(7), given)
    pool.blend(0, 0.5)
    pool.blend(1, 1.0)
    for pair, old in zip(given, kept, strict=True):
        for state, before in zip(pair, old, strict=True):
            assert all(torch.equal(state[name], before[name]) for name in before)
    torch.testing.assert_close(
        pool.blend(0, 0.0).state_dict()["classifier.weight"], kept[0][0]["classifier.weight"]
    )


def test_gradients_reach_the_images_and_not_the_weights(images: Tensor) -> None:
    pool = ExtractorPool(network(7), states(1))
    x = images.requires_grad_()
    pool.blend(0, 0.5).features(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in pool.models[0].parameters())


def test_the_statistics_of_batch_norm_are_the_blends_not_the_batchs(images: Tensor) -> None:
    model = ExtractorPool(network(7), states(1)).blend(0, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = model.features(images[:1])
    torch.testing.assert_close(model.features(images)[:1], alone)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_draws_are_uniform_over_members_and_beta() -> None:
    pool, generator = ExtractorPool(network(7), states(4)), torch.Generator().manual_seed(1)
    draws = [pool.draw(generator) for _ in range(4000)]
    members = Counter(index for index, _ in draws)
    assert all(abs(members[i] - 1000) < 120 for i in range(4))  # about four standard deviations
    betas = torch.tensor([beta for _, beta in draws])
    assert 0 <= float(betas.min()) < 0.01
    assert 0.99 < float(betas.max()) <= 1
    assert abs(float(betas.mean()) - 0.5) < 0.02
    again = torch.Generator().manual_seed(1)
    assert [pool.draw(again) for _ in range(10)] == draws[:10]


def test_draws_between_two_numbers() -> None:
    pool, generator = ExtractorPool(network(7), states(2)), torch.Generator().manual_seed(1)
    betas = [pool.draw(generator, (0.2, 0.4))[1] for _ in range(500)]
    assert 0.2 <= min(betas) < 0.21
    assert 0.39 < max(betas) <= 0.4
    assert {pool.draw(generator, (1.0, 1.0))[1] for _ in range(10)} == {1.0}


def test_the_length_is_the_number_of_members() -> None:
    assert len(ExtractorPool(network(7), states(3))) == 3


def test_weights_of_another_architecture_are_refused() -> None:
    other = build_model(
        ModelConfig(depth=2, width=8, norm="batch"), num_classes=3, channels=3, image_size=8, seed=0
    ).state_dict()
    with pytest.raises((ValueError, RuntimeError)):
        ExtractorPool(network(7), [(network(0).state_dict(), other)]).blend(0, 0.5)


def trajectories(count: int, snapshots: int) -> list[list[dict[str, Tensor]]]:
    return [[network(100 * i + j).state_dict() for j in range(snapshots)] for i in range(count)]


def test_snapshots_and_blends_of_two_of_them(images: Tensor) -> None:
    pool, given = ExtractorPool(network(7), trajectories(2, 4)), trajectories(2, 4)[1]
    expected = network(8)
    for first, second, beta in ((2, 2, 0.0), (0, 3, 1.0), (1, 2, 0.25)):
        expected.load_state_dict(
            {
                k: v.lerp(given[second][k], beta) if v.is_floating_point() else v
                for k, v in given[first].items()
            }
        )
        model = pool.blend(1, beta, first, second)
        torch.testing.assert_close(model(images), expected(images))
        assert not torch.allclose(pool.blend(1, 0.5)(images), expected(images))  # negative control


def test_a_blend_draws_what_it_always_did() -> None:
    """The choice of two states and their blend does not depend on what else a pool holds."""
    pool = ExtractorPool(network(7), trajectories(4, 3))
    for seed in range(20):
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        member, beta = pool.draw(first, (0.2, 0.9))
        assert pool.draw_step(second, "blend", (0.2, 0.9)) == (
            (member, beta, 0, -1),
            (member, 1.0, 0, -1),
        )


def test_snapshots_are_drawn_uniformly() -> None:
    pool, generator = ExtractorPool(network(7), trajectories(2, 5)), torch.Generator()
    draws = [pool.draw_step(generator.manual_seed(i), "snapshot")[0] for i in range(2000)]
    assert {(d.beta, d.first - d.second) for d in draws} == {(0.0, 0)}
    found = Counter((d.member, d.first) for d in draws)
    assert len(found) == 10
    assert all(abs(n - 200) < 60 for n in found.values())  # more than four standard deviations


def test_the_classifier_is_later_on_the_same_trajectory() -> None:
    """Snapshots after 0, 2, 4, 5 epochs, and a classifier 1 to 2 epochs later: the first one that
    is no earlier; the last one where the trajectory ends.
    """
    pool = ExtractorPool(network(7), trajectories(3, 4), epochs=(0, 2, 4, 5))
    generator, seen = torch.Generator(), set()
    for kind in ("snapshot", "snapshot_blend"):
        for i in range(300):
            extractor, classifier = pool.draw_step(
                generator.manual_seed(i), kind, (0.0, 1.0), ahead=(1, 2)
            )
            assert classifier.member == extractor.member
            assert classifier.first == classifier.second
            assert extractor.first <= extractor.second
            seen.add((extractor.second, classifier.first))
    assert seen == {(0, 1), (1, 2), (2, 3), (3, 3)}
    now = [pool.draw_step(generator.manual_seed(i), "snapshot", ahead=(0, 0)) for i in range(50)]
    assert all(extractor == classifier for extractor, classifier in now)


@pytest.mark.parametrize(
    ("given", "epochs", "message"),
    [
        (trajectories(2, 3), (0, 4), "must have 2 snapshots.*3"),
        ([*trajectories(1, 3), *trajectories(1, 2)], None, "must have 3 snapshots.*2"),
        (trajectories(1, 3), (0, 4, 4), "rising numbers, got"),
        (trajectories(1, 1), None, "at least two"),
    ],
)
def test_trajectories_that_do_not_fit(
    given: list[list[dict[str, Tensor]]], epochs: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractorPool(network(7), given, epochs=epochs)
