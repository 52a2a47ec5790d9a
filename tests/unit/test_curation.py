"""Soft labels: what they are, how they are kept, and how a network learns from them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ncfm
from ncfm.curation import CurateConfig, ViewLabels, curate, soft_labels, view_label_bytes
from ncfm.images import ImageSpec, InMemoryImages
from ncfm.models import Classifier
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig, train

SPEC = ImageSpec(channels=1, image_size=4, mean=(0.5,), std=(0.5,), class_names=("a", "b", "c"))


class Fixed(Classifier):
    """Logits that are a known function of the mean normalised pixel."""

    def __init__(self, slope: float) -> None:
        super().__init__(nn.Identity(), 16, 3)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        level = self.slope * x.mean((1, 2, 3))
        return torch.stack([level, 0 * level, -level], dim=1)


def grey(levels: list[float], labels: list[int], factor: int = 1) -> SyntheticSet:
    images = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return SyntheticSet(images, torch.tensor(labels), factor, SPEC, {"seed": 0})


def expected(level: float, slope: float, temperature: float = 1.0) -> Tensor:
    u = torch.tensor(slope * (level - 0.5) / 0.5 / temperature)
    return torch.stack([u, 0 * u, -u]).softmax(0)


def test_they_are_the_mean_softmax_of_the_teachers() -> None:
    made = soft_labels(grey([0.9, 0.2], [0, 2]), [Fixed(1), Fixed(4)], CurateConfig())
    for row, level in zip(made, (0.9, 0.2), strict=True):
        torch.testing.assert_close(row, (expected(level, 1) + expected(level, 4)) / 2)
    torch.testing.assert_close(made.sum(1), torch.ones(2))


def test_temperature_flattens_them() -> None:
    made = soft_labels(grey([0.9], [0]), [Fixed(2)], CurateConfig(temperature=4.0))
    torch.testing.assert_close(made[0], expected(0.9, 2, 4.0))


def test_an_image_taken_for_another_class_keeps_its_hard_label() -> None:
    synthetic = grey([0.9, 0.9], [0, 2])
    made = soft_labels(synthetic, [Fixed(2)], CurateConfig())
    torch.testing.assert_close(made[0], expected(0.9, 2))
    torch.testing.assert_close(made[1], torch.tensor([0.0, 0.0, 1.0]))
    free = soft_labels(synthetic, [Fixed(2)], CurateConfig(keep_class=False))
    torch.testing.assert_close(free[1], expected(0.9, 2))


def test_they_belong_to_the_decoded_images() -> None:
    """Each tile of a stored image has a label of its own."""
    stored = torch.zeros(1, 1, 4, 4)
    stored[..., :2, :2], stored[..., 2:, 2:] = 1.0, 0.8
    synthetic = SyntheticSet(stored, torch.tensor([0]), 2, SPEC)
    made = soft_labels(synthetic, [Fixed(1)], CurateConfig(keep_class=False))
    assert made.shape == (4, 3)
    for row, level in zip(made, (1.0, 0.0, 0.0, 0.8), strict=True):
        torch.testing.assert_close(row, expected(level, 1))


def test_no_teacher_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        soft_labels(grey([0.9], [0]), [], CurateConfig())


def test_saved_loaded_and_offered_beside_the_hard_ones(tmp_path: Path) -> None:
    plain = grey([0.9, 0.1], [0, 2], factor=2)
    made = curate(plain, [Fixed(1)], CurateConfig())
    made.save(tmp_path / "soft")
    loaded = ncfm.load(tmp_path / "soft")
    assert loaded.soft_labels is not None
    assert made.soft_labels is not None
    assert torch.equal(loaded.soft_labels, made.soft_labels)
    assert torch.equal(loaded.images, plain.images)
    assert int(loaded.dataset()[7][1]) == 2
    assert torch.equal(loaded.dataset(soft=True)[7][1], made.soft_labels[7])
    plain.save(tmp_path / "hard")
    hard = ncfm.load(tmp_path / "hard")
    assert hard.soft_labels is None
    with pytest.raises(ValueError, match="no soft labels"):
        hard.dataset(soft=True)


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"soft_labels must be \(4, 3\)"):
        dataclasses.replace(grey([0.9], [0], factor=2), soft_labels=torch.ones(1, 3))


@pytest.mark.parametrize("change", [{"networks": 0}, {"temperature": 0.0}, {"hard_fraction": 1.5}])
def test_impossible_values_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        CurateConfig(**change)  # type: ignore[arg-type]


def test_the_last_epochs_learn_from_the_tail() -> None:
    walked: list[str] = []

    class Named(InMemoryImages):
        name = ""

        def epoch(
            self, batch_size: int, generator: torch.Generator | None
        ) -> Iterator[tuple[Tensor, Tensor]]:
            walked.append("hard" if self.labels.ndim == 1 else "soft")
            return super().epoch(batch_size, generator)

    images = torch.rand(6, 1, 4, 4)
    hard, soft = Named(images, torch.arange(6) % 3), Named(images, torch.full((6, 3), 1 / 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    config = TrainConfig(epochs=5)
    train(model, soft, SPEC, config, seed=0, tail=hard, tail_epochs=2)
    assert walked == ["soft"] * 3 + ["hard"] * 2
    walked.clear()
    train(model, soft, SPEC, config, seed=0)
    assert walked == ["soft"] * 5


def test_labels_of_views() -> None:
    """Of what the network is given, mixed labels included; those that the teachers take for another
    class keep theirs.
    """
    views = torch.tensor([0.8, -0.6, 0.8]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    labels = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    config = CurateConfig(temperature=2.0)
    found = ViewLabels([Fixed(1), Fixed(4)], config)(views, labels)
    for row, level in ((0, 0.9), (1, 0.2)):  # of pixels whose normalised values these are
        both = [expected(level, slope, 2.0) for slope in (1, 4)]
        torch.testing.assert_close(found[row], (both[0] + both[1]) / 2)
    assert torch.equal(found[2], labels[2])
    free = ViewLabels([Fixed(1)], dataclasses.replace(config, keep_class=False))(views, labels)
    torch.testing.assert_close(free[2], expected(0.9, 1, 2.0))
    with pytest.raises(ValueError, match="at least one"):
        ViewLabels([], config)


def test_views_are_relabelled_after_all_augmentation() -> None:
    """What the labels are made from is what the network sees; the tail keeps its labels."""
    seen: list[tuple[Tensor, Tensor]] = []
    logged: list[Tensor] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logged.append(x.detach().clone())
            logits: Tensor = self.layer(x.flatten(1))
            return logits

    def relabel(views: Tensor, labels: Tensor) -> Tensor:
        seen.append((views.clone(), labels.clone()))
        return torch.full_like(labels, 1 / 3)

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 4, 4, generator=generator)
    data = InMemoryImages(images, torch.arange(6) % 3)
    config = TrainConfig(epochs=4, batch_size=6, cutmix_prob=1.0)
    tail = InMemoryImages(images, torch.arange(6) % 3)
    losses: list[float] = []
    train(
        Looking(), data, SPEC, config, seed=0, relabel=relabel, tail=tail, tail_epochs=1,
        report=lambda epoch: losses.append(epoch.loss),
    )  # fmt: skip
    assert len(seen) == 3
    for (views, _), given in zip(seen, logged, strict=False):
        torch.testing.assert_close(torch.cat([given]), views[: len(given)])
    assert any(not torch.equal(labels, labels.round()) for _, labels in seen)  # mixed by CutMix
    assert len({views.sum().item() for views, _ in seen}) == 3  # another view in every epoch


def test_what_labels_of_views_take() -> None:
    """FKD's arithmetic: a float16 for each class of each image in each epoch."""
    assert view_label_bytes(epochs=300, images=100, classes=10) == 600_000
