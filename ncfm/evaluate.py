"""How good a set of images is: the accuracy of a fresh network trained on it."""

import torch

from ncfm.images import ImageSource, ImageSpec
from ncfm.models import ModelConfig, build_model
from ncfm.seeding import keyed_seed
from ncfm.train import TrainConfig, accuracy, train


def evaluate_once(
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
) -> float:
    """Train one fresh network and test it once, after its last epoch: accuracy in [0, 1]. Never
    best-on-test. `tail` is what the last `tail_epochs` learn from, if it is not `train_on`.
    """
    network = build_model(
        model,
        num_classes=spec.num_classes,
        channels=spec.channels,
        image_size=spec.image_size,
        seed=keyed_seed(seed, "evaluation_network"),
    )
    train(
        network,
        train_on,
        spec,
        training,
        seed=seed,
        device=device,
        tail=tail,
        tail_epochs=tail_epochs,
    )
    return accuracy(network, test_on, spec, device=device)
