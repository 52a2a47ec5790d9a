"""Soft labels: what they are, how they are kept, and how a network learns from them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ncfm
from ncfm.curation import CurateConfig, curate, soft_labels
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
