"""Evaluation protocols by name: every choice that an accuracy depends on, in one place.

`evaluate.protocol` sets all fields of `EvaluateConfig` but `networks`, and those of `curate`. A
protocol that a preset names gives way to the other values of the preset; one that is named on the
command line overrides the preset and gives way to the other options of the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ncfm.curation import CurateConfig
from ncfm.registry import lookup
from ncfm.train import TrainConfig, released_training
from pipeline.runtime.identity import dotted

EvaluatedSet = Literal["distilled", "random", "random_same_factor", "herding", "whole"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How sets of images are judged."""

    protocol: str = "default"
    """default: hard labels, last epoch. paper: the same, and best-on-test in a column of its own.
    soft: stored soft labels, too. quick: few epochs, to tell good configurations from bad ones.
    cosine: default with a cosine learning rate and averaged weights; name it beside an accuracy."""
    networks: tuple[str, ...] = ()
    """Networks to train, as model.name takes them; none: that of model alone."""
    repeats: int = 10
    """Fresh networks per set (paper: 10; 3 for the ImageNet subsets)."""
    sets: tuple[EvaluatedSet, ...] = get_args(EvaluatedSet)
    """What networks are trained on: the distilled set; `random` real images, as many as it stores
    (random_same_factor: as many as it decodes to, shrunk); `herding`: real images that the pool's
    features choose; the `whole` training set, which takes longest. With stored soft labels
    (`curate.soft_labels`) the distilled and the random set also count with these."""
    best_on_test_every: int = 0
    """Also test every this many epochs and report the best accuracy, which is selected on the test
    images, as best on test (released code: 100). 0: test once, after the last epoch."""
    training: TrainConfig = field(default_factory=lambda: released_training(2000))
    """Training on a small set; the defaults are the released code's."""
    whole_epochs: int = 60
    """Epochs on the whole training set."""

    def __post_init__(self) -> None:
        for name in ("repeats", "whole_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise ValueError(f"sets must name one or more, each once, got {list(self.sets)}")
        if self.best_on_test_every < 0:
            raise ValueError(
                f"best_on_test_every must not be negative, got {self.best_on_test_every}"
            )


@dataclass(frozen=True)
class Protocol:
    """What a protocol fixes."""

    evaluate: EvaluateConfig
    curate: CurateConfig = field(default_factory=CurateConfig)


PROTOCOLS: dict[str, Protocol] = {
    "default": Protocol(EvaluateConfig()),
    "paper": Protocol(EvaluateConfig(protocol="paper", best_on_test_every=100)),
    "soft": Protocol(EvaluateConfig(protocol="soft"), CurateConfig(soft_labels=True)),
    "quick": Protocol(
        EvaluateConfig(
            protocol="quick",
            repeats=2,
            sets=("distilled", "random", "random_same_factor", "whole"),
            training=released_training(200),
            whole_epochs=10,
        )
    ),
    "cosine": Protocol(
        EvaluateConfig(
            protocol="cosine",
            training=dataclasses.replace(released_training(2000), schedule="cosine", ema=0.99),
        )
    ),
}


def protocol_settings(name: str) -> dict[str, Any]:
    """What a protocol sets: dotted option -> value. Raises ValueError if there is no such."""
    protocol: Protocol = lookup("evaluate.protocol", name, PROTOCOLS)
    found = _options(protocol.evaluate, protocol.curate)
    del found["evaluate.networks"]
    return {**found, "evaluate.protocol": name}


def protocol_changes(evaluate: EvaluateConfig, curate: CurateConfig) -> list[str]:
    """The options whose values are not those of the protocol that the configuration names."""
    mine = _options(evaluate, curate)
    wanted = protocol_settings(evaluate.protocol)
    return [name for name, value in wanted.items() if mine[name] != value]


def _options(evaluate: EvaluateConfig, curate: CurateConfig) -> dict[str, Any]:
    return dotted({"evaluate": dataclasses.asdict(evaluate), "curate": dataclasses.asdict(curate)})
