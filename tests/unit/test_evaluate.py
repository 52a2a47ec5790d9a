"""What is made of a network's answers: confusion, best-on-test, intervals, ranking measures."""

import dataclasses
import math

import pytest
import torch
from test_train import MODEL, QUICK, SPEC, two_classes

from ncfm.evaluate import (
    confidence_interval,
    confusion_matrix,
    ranking_measures,
    repeats_needed,
    train_and_test,
)
from ncfm.images import InMemoryImages, Relabelled


class Says(torch.nn.Module):
    """Class 1, but class 0 where the first pixel is dark."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (SPEC.std[0] * x[:, 0, 0, 0] + SPEC.mean[0]) > 0.5
        return torch.nn.functional.one_hot(bright.long(), 2).float()


def test_confusion_has_truth_in_rows() -> None:
    said, truth = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1])
    images = (said * 255).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    counts = confusion_matrix(Says(), InMemoryImages(images, truth), SPEC, batch_size=2)
    assert counts.tolist() == [[1, 2], [1, 1]]


def test_best_on_test_leaves_the_last_epoch_as_it_was() -> None:
    training = dataclasses.replace(QUICK, epochs=5)
    train_on, test_on = two_classes(16, 0), two_classes(64, 1)
    arguments = {"model": MODEL, "training": training, "seed": 3}
    plain = train_and_test(train_on, test_on, SPEC, **arguments)  # type: ignore[arg-type]
    both = train_and_test(train_on, test_on, SPEC, **arguments, test_every=1)  # type: ignore[arg-type]
    assert plain.best_test_accuracy is None
    assert torch.equal(plain.confusion, both.confusion)
    assert both.best_test_accuracy is not None
    assert both.best_test_accuracy >= both.accuracy == plain.accuracy


def test_best_on_test_is_the_best_of_the_epochs() -> None:
    """Every prefix of a training is the training of its own with a constant rate."""
    training = dataclasses.replace(QUICK, epochs=4, milestones=())
    train_on, test_on = two_classes(16, 0), two_classes(64, 1)
    each = [
        train_and_test(
            train_on,
            test_on,
            SPEC,
            model=MODEL,
            training=dataclasses.replace(training, epochs=epochs),
            seed=5,
        ).accuracy
        for epochs in (1, 2, 3, 4)
    ]
    found = train_and_test(
        train_on, test_on, SPEC, model=MODEL, training=training, seed=5, test_every=1
    ).best_test_accuracy
    assert found == max(each)


def test_confidence_interval_is_students() -> None:
    """t = 4.303 for three values, 2.262 for ten (tables); a known sample by hand."""
    assert confidence_interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert confidence_interval(list(range(10))) == pytest.approx(
        2.2622 * 3.02765 / math.sqrt(10), rel=1e-4
    )
    assert confidence_interval([0.5]) is None


def test_confidence_interval_covers_as_often_as_it_says() -> None:
    draws = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).double()
    covered = [abs(float(row.mean())) <= (confidence_interval(row.tolist()) or 0) for row in draws]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.02)


def test_repeats_needed_finds_the_difference_in_four_of_five_trials() -> None:
    assert repeats_needed(1.0, 1.0) == 16
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2000, 16, generator=generator)
    other = torch.randn(2000, 16, generator=generator) + 1
    statistic = (other.mean(1) - one.mean(1)) / ((one.var(1) + other.var(1)) / 16).sqrt()
    assert float((statistic > 2.042).double().mean()) == pytest.approx(0.8, abs=0.04)
    with pytest.raises(ValueError, match="got 0"):
        repeats_needed(1.0, 0.0)


def test_ranking_measures_at_their_ends() -> None:
    best = ranking_measures(whole=0.0, hard=1.0, as_used=1.0, random=0.0)
    worst = ranking_measures(whole=1.0, hard=0.0, as_used=0.0, random=1.0)
    assert best.label_robust_score == pytest.approx(1)
    assert worst.label_robust_score == pytest.approx(0)
    some = ranking_measures(whole=0.9, hard=0.6, as_used=0.7, random=0.4)
    assert some.hard_label_recovery == pytest.approx(0.3)
    assert some.improvement_over_random == pytest.approx(0.3)
    assert some.label_robust_score == pytest.approx((1 - 1 / math.e) / (math.e - 1 / math.e))


def test_relabelled_classes_begin_at_zero() -> None:
    data = InMemoryImages(torch.arange(4).view(4, 1, 1, 1), torch.tensor([7, 2, 7, 5]))
    source = Relabelled(data, (5, 7, 2))
    (_, labels), *_ = source.epoch(4, None)
    assert labels.tolist() == [1, 2, 1, 0]
    assert len(source) == 4


def test_soft_labels_of_some_classes_are_distributions_over_these() -> None:
    soft = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.25, 0.0]])
    source = Relabelled(InMemoryImages(torch.zeros(2, 1, 1, 1), soft), (3, 1))
    ((_, labels),) = source.epoch(2, None)
    torch.testing.assert_close(labels, torch.tensor([[2 / 3, 1 / 3], [0.0, 1.0]]))
