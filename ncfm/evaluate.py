"""Evaluation of a set of images: the test accuracy of fresh networks trained on it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ncfm.backend.kernels import kernel_logits
from ncfm.backend.threads import thread_map
from ncfm.images import ImageSource, ImageSpec, to_device, to_unit
from ncfm.models import ModelConfig, build_model
from ncfm.seeding import keyed_seed
from ncfm.train import EpochReport, TrainConfig, train

CPU_BATCH = 32  # images of a batch that a thread tests at a time


@dataclass(frozen=True)
class EvaluationResult:
    """The test result of one network trained on a set."""

    confusion: Tensor  # (classes, classes) int64: [i, j] images of class i predicted as j
    best_test_accuracy: float | None = None  # best on test, in [0, 1], with `test_every`

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in [0, 1], after the last epoch."""
        return _accuracy(self.confusion)


def train_and_test(
    train_on: ImageSource,
    test_on: ImageSource,
    spec: ImageSpec,
    *,
    model: ModelConfig,
    training: TrainConfig,
    seed: int,
    device: torch.device | str = "cpu",
    tail: ImageSource | None = None,
    tail_epochs: int = 0,
    test_every: int = 0,
    threads: int = 1,
    relabel: Callable[[Tensor, Tensor], Tensor] | None = None,
    on_batch: Callable[[float], None] | None = None,
) -> EvaluationResult:
    """Train one fresh network and test it after its last epoch; `threads`, `relabel` and `on_batch`
    as those of `train`.

    `tail` is what the last `tail_epochs` learn from, if it is not `train_on`. With `test_every`
    the network is also tested after every so many epochs, as the released code does, for the best
    of these accuracies; its training is the same. Otherwise the test images are looked at once.
    """
    network = build_model(
        model,
        num_classes=spec.num_classes,
        channels=spec.channels,
        image_size=spec.image_size,
        seed=keyed_seed(seed, "evaluation_network"),
    )
    tested: list[float] = []

    def test(report: EpochReport) -> None:
        last = report.epoch + 1 == training.epochs
        if test_every and (report.epoch + 1) % test_every == 0 and not last:
            tested.append(accuracy(network, test_on, spec, device=device, threads=threads))
            network.train()

    train(
        network,
        train_on,
        spec,
        training,
        seed=seed,
        device=device,
        report=test,
        tail=tail,
        tail_epochs=tail_epochs,
        threads=threads,
        relabel=relabel,
        on_batch=on_batch,
    )
    result = EvaluationResult(
        confusion_matrix(network, test_on, spec, device=device, threads=threads)
    )
    if not test_every:
        return result
    return EvaluationResult(result.confusion, max([*tested, result.accuracy]))


def confusion_matrix(
    model: nn.Module,
    data: ImageSource,
    spec: ImageSpec,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    threads: int = 1,
) -> Tensor:
    """(classes, classes) int64: [i, j] images of class i predicted as j, in eval mode."""
    model.to(device).eval()
    classes = spec.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.long)
    part = CPU_BATCH if torch.device(device).type == "cpu" else batch_size
    logits = kernel_logits(model, training=False) or model

    def classify(images: Tensor) -> Tensor:
        with torch.no_grad():  # in its thread, too
            predicted: Tensor = logits(spec.normalize(to_unit(to_device(images, device)))).argmax(1)
        return predicted.cpu()

    with thread_map(threads) as each:
        for images, labels in data.epoch(batch_size, None):
            predicted = torch.cat(list(each(classify, images.split(part))))
            counts += torch.bincount(
                labels.cpu() * classes + predicted, minlength=classes * classes
            )
    return counts.view(classes, classes)


def accuracy(
    model: nn.Module,
    data: ImageSource,
    spec: ImageSpec,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    threads: int = 1,
) -> float:
    """Top-1 accuracy in [0, 1] of a model in eval mode."""
    return _accuracy(
        confusion_matrix(model, data, spec, batch_size=batch_size, device=device, threads=threads)
    )


def _accuracy(confusion: Tensor) -> float:
    return int(confusion.diagonal().sum()) / int(confusion.sum())


def confidence_interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of Student's confidence interval of the mean; None for fewer than two values.

    It covers the evaluation's randomness alone: other networks and, for sets that are drawn anew
    in every run, other draws.
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    sample = torch.tensor(values, dtype=torch.float64)
    quantile = float(stdtrit(len(values) - 1, (1 + level) / 2))
    return quantile * float(sample.std()) / math.sqrt(len(values))


def repeats_needed(std: float, difference: float) -> int:
    """Runs of each of two sets to detect a true difference of their means at the 5 % level with
    80 % power, if both have this standard deviation: 2 (1.96 + 0.84)^2 (std /
    difference)^2, rounded up.
    """
    if not difference > 0:
        raise ValueError(f"difference must be positive, got {difference}")
    return max(2, math.ceil(2 * (1.959964 + 0.841621) ** 2 * (std / difference) ** 2))


@dataclass(frozen=True, kw_only=True)
class RankingMeasures:
    """Measures from the definitions of DD-Ranking (Li et al., arXiv 2505.13300), computed by us
    from our accuracies: not comparable with its leaderboard, whose training differs.
    """

    hard_label_recovery: float
    """Accuracy on the whole real set minus that on the synthetic set with hard labels: what is
    lost. Lower is better."""
    improvement_over_random: float
    """Accuracy on the synthetic set minus that on random images of the same number that are trained
    on in the same way, soft labels included."""
    label_robust_score: float
    """(e^a - 1/e) / (e - 1/e) in [0, 1], a = w improvement - (1 - w) recovery, w = 0.5."""


def ranking_measures(
    *, whole: float, hard: float, as_used: float, random: float, weight: float = 0.5
) -> RankingMeasures:
    """DD-Ranking's measures from four accuracies in [0, 1].

    Args:
        whole: trained on the whole real set.
        hard: on the synthetic set with hard labels.
        as_used: on the synthetic set as its method uses it (with soft labels, if it has some).
        random: on random images, used in that same way.
        weight: w, of the improvement over random.
    """
    recovery, improvement = whole - hard, as_used - random
    alpha = weight * improvement - (1 - weight) * recovery
    score = (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
    return RankingMeasures(
        hard_label_recovery=recovery,
        improvement_over_random=improvement,
        label_robust_score=score,
    )
