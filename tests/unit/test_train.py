"""The training loop, the evaluation, and the baselines."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ncfm.train
from ncfm.augment import AugmentConfig
from ncfm.baselines import herding, herding_set, random_set
from ncfm.evaluate import accuracy, confusion_matrix, train_and_test
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import ModelConfig, build_model
from ncfm.train import EpochReport, TrainConfig, learning_rate, train
from ncfm.training_state import TrainingState

SPEC = ImageSpec(channels=1, image_size=8, mean=(0.5,), std=(0.3,), class_names=("dark", "bright"))
MODEL = ModelConfig(depth=2, width=8)
QUICK = TrainConfig(epochs=6, batch_size=16, lr=0.05, augment=AugmentConfig(strategy="none"))


def two_classes(count: int, seed: int) -> InMemoryImages:
    """Left half bright or right half bright, under noise."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(count, 1, 8, 8, generator=generator) * 0.5, torch.arange(count) % 2
    images[labels == 0, :, :, :4] += 0.4
    images[labels == 1, :, :, 4:] += 0.4
    return InMemoryImages((images * 255).to(torch.uint8), labels)


def network(seed: int = 0) -> torch.nn.Module:
    return build_model(MODEL, num_classes=2, channels=1, image_size=8, seed=seed)


def test_training_learns_and_reports() -> None:
    reports: list[EpochReport] = []
    model = train(network(), two_classes(64, 0), SPEC, QUICK, seed=0, report=reports.append)
    assert accuracy(model, two_classes(64, 1), SPEC) > 0.9
    assert [r.epoch for r in reports] == list(range(6))
    assert reports[-1].loss < reports[0].loss
    assert accuracy(network(), two_classes(64, 1), SPEC) < 0.8  # negative control: untrained


def test_training_follows_the_seed_alone() -> None:
    config = dataclasses.replace(QUICK, epochs=2, cutmix_prob=0.5, augment=AugmentConfig())

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)  # the global generator must not matter
        torch.rand(seed + 1)
        model = train(network(), two_classes(32, 0), SPEC, config, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_layers_that_draw_follow_the_seed() -> None:
    """Dropout draws from the global generator, which is left as it was."""
    config = dataclasses.replace(QUICK, epochs=1)

    def weights(seed: int, before: int) -> torch.Tensor:
        net = build_model(
            ModelConfig(name="mobilenet_v2"), num_classes=2, channels=1, image_size=8, seed=0
        )
        assert any(isinstance(layer, torch.nn.Dropout) for layer in net.modules())
        torch.manual_seed(before)
        train(net, two_classes(32, 0), SPEC, config, seed=seed, threads=2)
        assert torch.initial_seed() == before
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights(1, before=1), weights(1, before=2))
    assert not torch.equal(weights(1, before=1), weights(2, before=1))


@pytest.fixture
def _one_thread_an_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread_an_operation")
def test_threads_make_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and so do those that test it."""
    monkeypatch.setattr(ncfm.train, "PART_PIXELS", 5 * SPEC.image_size**2)
    config = dataclasses.replace(QUICK, epochs=3, cutmix_prob=0.5, augment=AugmentConfig())
    at_work: set[str] = set()

    def trained(threads: int) -> tuple[torch.Tensor, torch.Tensor]:
        at_work.clear()
        model = network()
        model.register_forward_pre_hook(lambda *_: at_work.add(threading.current_thread().name))
        train(model, two_classes(40, 0), SPEC, config, seed=0, threads=threads)
        found = confusion_matrix(model, two_classes(100, 1), SPEC, threads=threads)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), found

    weights, found = trained(1)
    assert at_work == {"MainThread"}
    for threads in (2, 3):
        theirs, said = trained(threads)
        assert torch.equal(theirs, weights)
        assert torch.equal(said, found)
        assert len(at_work) > 1


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_parts_of_a_batch_make_the_step_of_the_whole(
    norm: Literal["instance", "batch"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding; statistics of a batch are those of all of it."""
    config = dataclasses.replace(QUICK, epochs=2, cutmix_prob=0.5, augment=AugmentConfig())
    kind, sizes = dataclasses.replace(MODEL, norm=norm), set()

    def trained(images: int) -> tuple[torch.Tensor, list[float]]:
        monkeypatch.setattr(ncfm.train, "PART_PIXELS", images * SPEC.image_size**2)
        model = build_model(kind, num_classes=2, channels=1, image_size=8, seed=0).double()
        model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
        reports: list[EpochReport] = []
        data = two_classes(40, 0)
        data = InMemoryImages(data.images.double() / 255, data.labels)
        train(model, data, SPEC, config, seed=0, report=reports.append)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return weights, [value for r in reports for value in (r.loss, r.accuracy)]

    whole, whole_reports = trained(16)
    assert sizes == {16, 8}
    parts, reports = trained(5)
    assert sizes == ({16, 8} if norm == "batch" else {16, 8, 4})
    torch.testing.assert_close(parts, whole, atol=1e-9, rtol=0)
    assert reports == pytest.approx(whole_reports, rel=1e-5)


def test_soft_labels_are_learned() -> None:
    data = two_classes(64, 0)
    soft = torch.nn.functional.one_hot(data.labels, 2).float() * 0.8 + 0.1
    model = train(network(), InMemoryImages(data.images, soft), SPEC, QUICK, seed=0)
    assert accuracy(model, two_classes(64, 1), SPEC) > 0.9


def test_divergence_is_an_error_with_its_epoch() -> None:
    with pytest.raises(FloatingPointError, match="epoch 0"):
        train(network(), two_classes(64, 0), SPEC, dataclasses.replace(QUICK, lr=1e30), seed=0)


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        train(network(), two_classes(0, 0), SPEC, QUICK, seed=0)


def test_every_image_comes_once_an_epoch() -> None:
    """Fault 5 of the released code: the test set is padded over ranks."""
    data = InMemoryImages(torch.arange(10).view(10, 1, 1, 1), torch.arange(10))
    for generator in (None, torch.Generator().manual_seed(0)):
        seen = torch.cat([labels for _, labels in data.epoch(3, generator)])
        assert sorted(seen.tolist()) == list(range(10))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_accuracy_counts_every_image_once(batch_size: int) -> None:
    """Fault 5 of the released code: a padded test set counts some images twice."""

    class Reads(torch.nn.Module):  # the class is what the first pixel says
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = SPEC.std[0] * x[:, 0, 0, 0] + SPEC.mean[0]
            return torch.stack([1 - bright, bright], dim=1)

    said = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1])
    truth = said.clone()
    truth[[0, 8, 9]] ^= 1  # wrong at the ends, where padding would repeat
    data = InMemoryImages((said * 255).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), truth)
    assert accuracy(Reads(), data, SPEC, batch_size=batch_size) == 0.7


def test_evaluation_reports_the_last_epoch_and_looks_once_at_the_test_set() -> None:
    """Fault 5 of the released code: best-on-test accuracy."""

    class Counted(InMemoryImages):
        walks = 0

        def epoch(self, batch_size: int, generator: torch.Generator | None):  # type: ignore[no-untyped-def]
            Counted.walks += 1
            assert generator is None
            return super().epoch(batch_size, generator)

    test_set = two_classes(32, 1)
    value = train_and_test(
        two_classes(32, 0),
        Counted(test_set.images, test_set.labels),
        SPEC,
        model=MODEL,
        training=QUICK,
        seed=0,
    ).accuracy
    assert Counted.walks == 1
    assert 0.8 < value <= 1


def test_herding_follows_the_mean() -> None:
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    chosen = herding(features, 10)
    assert len(set(chosen.tolist())) == 10
    distance = (features[chosen].mean(0) - features.mean(0)).norm()
    random = [
        (features[torch.randperm(200)[:10]].mean(0) - features.mean(0)).norm() for _ in range(50)
    ]
    assert distance < min(random)
    # The first is the sample nearest to the mean; checked by brute force.
    assert int(chosen[0]) == int((features - features.mean(0)).norm(dim=1).argmin())
    with pytest.raises(ValueError, match="got 201"):
        herding(features, 201)


def test_random_set_packs_factor_squared_images() -> None:
    real = torch.full((20, 1, 8, 8), 128, dtype=torch.uint8)
    assert random_set(real, 2, seed=0, class_index=0).shape == (2, 1, 8, 8)
    packed = random_set(real, 2, seed=0, class_index=0, factor=2)
    torch.testing.assert_close(packed, torch.full((2, 1, 8, 8), 128 / 255))


def test_herding_set_is_herding_of_the_networks_features() -> None:
    extractor = build_model(MODEL, num_classes=2, channels=1, image_size=8, seed=0).eval()
    data = two_classes(41, 0)
    with torch.no_grad():
        features = extractor.features(SPEC.normalize(data.images.float() / 255))
    chosen = herding(features, 5)
    made = herding_set(data, 5, extractor, SPEC, batch_size=7)
    torch.testing.assert_close(made, data.images[chosen].float() / 255)
    few = herding_set(two_classes(3, 0), 5, extractor, SPEC)
    assert few.shape == (5, 1, 8, 8)
    assert torch.equal(few[:2], few[3:])


class TestSchedulesAndAverages:
    def test_the_cosine_schedule_is_pytorch_s(self) -> None:
        config = dataclasses.replace(QUICK, epochs=20, schedule="cosine")
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        for epoch in range(20):
            expected = optimizer.param_groups[0]["lr"]
            assert learning_rate(config, epoch) == pytest.approx(expected, rel=1e-9)
            optimizer.step()
            scheduler.step()

    def test_the_steps_are_pytorch_s(self) -> None:
        config = dataclasses.replace(QUICK, epochs=20, milestones=(0.25, 0.5), gamma=0.2)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 10], gamma=0.2)
        for epoch in range(20):
            expected = optimizer.param_groups[0]["lr"]
            assert learning_rate(config, epoch) == pytest.approx(expected, rel=1e-9)
            optimizer.step()
            scheduler.step()

    def test_averages_are_pytorch_s_of_the_weights_after_every_batch(self) -> None:
        """Against swa_utils, fed by the weights of the same training without averages."""
        plain = dataclasses.replace(QUICK, epochs=3)
        model = network()
        reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        train(
            model,
            two_classes(40, 0),
            SPEC,
            plain,
            seed=0,
            on_batch=lambda _: reference.update_parameters(model),
        )
        averaged = train(
            network(), two_classes(40, 0), SPEC, dataclasses.replace(plain, ema=0.9), seed=0
        )
        for mine, theirs in zip(averaged.parameters(), reference.module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
        last = [
            torch.equal(a, p)
            for a, p in zip(averaged.parameters(), model.parameters(), strict=True)
        ]
        assert not any(last)  # negative control

    def test_a_report_sees_the_averaged_weights_and_leaves_the_training_alone(self) -> None:
        config = dataclasses.replace(QUICK, epochs=3, ema=0.9)
        seen: list[torch.Tensor] = []
        model = network()
        train(
            model, two_classes(40, 0), SPEC, config, seed=0,
            report=lambda _: seen.append(flat(model)),
        )  # fmt: skip
        assert torch.equal(seen[-1], flat(model))
        assert torch.equal(
            flat(train(network(), two_classes(40, 0), SPEC, config, seed=0)), flat(model)
        )

    @pytest.mark.parametrize(
        "value", [{"ema": 0.0}, {"ema": 1.0}, {"ema": -0.5}], ids=lambda v: str(v["ema"])
    )
    def test_an_impossible_decay_is_refused(self, value: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=f"ema.*{value['ema']}"):
            dataclasses.replace(QUICK, **value)  # type: ignore[arg-type]


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("convnet", {"optimizer": "sgd"}),
        ("convnet", {"optimizer": "sgd", "momentum": 0.0, "schedule": "cosine"}),
        ("convnet", {"optimizer": "adamw", "ema": 0.9}),
        ("mobilenet_v2", {"optimizer": "sgd"}),  # batch norm, and dropout's draws
    ],
)
def test_a_resumed_training_ends_with_the_same_bits(name: str, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(
        QUICK, epochs=4, cutmix_prob=0.5, augment=AugmentConfig(), lr=0.01, **changes
    )
    kind = MODEL if name == "convnet" else ModelConfig(name=name)
    data = two_classes(24, 0)

    def fresh() -> torch.nn.Module:
        return build_model(kind, num_classes=2, channels=1, image_size=8, seed=0)

    states: list[TrainingState] = []
    whole = train(fresh(), data, SPEC, config, seed=0, save=states.append)
    assert [int(state["epoch"]) for state in states] == [1, 2, 3, 4]
    for state in (states[1], states[3]):
        torch.rand(3)  # the global generator does not matter
        kept = {key: value.clone() for key, value in state.items()}
        reports: list[EpochReport] = []
        again = train(fresh(), data, SPEC, config, seed=0, resume=state, report=reports.append)
        assert [r.epoch for r in reports] == list(range(int(state["epoch"]), 4))
        for key, value in whole.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        assert all(torch.equal(state[key], value) for key, value in kept.items())
    # negative control: without the optimizer's state, or with another seed, it is another network
    other = train(fresh(), data, SPEC, config, seed=1, resume=states[1])
    assert not torch.equal(flat(other), flat(whole))


def test_batches_tell_how_many_epochs_are_done() -> None:
    told: list[float] = []
    train(
        network(), two_classes(40, 0), SPEC, dataclasses.replace(QUICK, epochs=2), seed=0,
        on_batch=told.append,
    )  # fmt: skip
    assert told == pytest.approx([0.4, 0.8, 1, 1.4, 1.8, 2])
