"""Evaluation protocols by name: every choice that an accuracy depends on, in one place.

`evaluate.protocol` sets all fields of `EvaluateConfig` except `networks`, and those of `curate`. A
preset's other values override the protocol it names; a protocol on the command line overrides the
preset, and other command-line options override the protocol.
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
    """Evaluation of image sets by networks trained on them."""

    protocol: str = "default"
    """default: hard labels, last epoch. paper: also best on test, in a column of its own. soft:
    also stored soft labels. quick: few epochs, for comparing configurations. cosine: default with
    a cosine learning rate and averaged weights; state it with every accuracy."""
    networks: tuple[str, ...] = ()
    """Networks to evaluate, named as for model.name; empty: the run's own model."""
    repeats: int = 10
    """Fresh networks per set (paper: 10; 3 for the ImageNet subsets)."""
    sets: tuple[EvaluatedSet, ...] = get_args(EvaluatedSet)
    """Training sets: the distilled set; `random` real images, as many as it stores
    (random_same_factor: as many as it decodes to, shrunk); `herding`: real images chosen by herding
    on the pool's features; the `whole` training set, which takes longest. With
    `curate.soft_labels`, the distilled and random sets are also evaluated with soft labels."""
    best_on_test_every: int = 0
    """Also test every this many epochs and report the best accuracy, which is selected on the test
    images, as best on test (released code: 100). 0: test once, after the last epoch."""
    training: TrainConfig = field(default_factory=lambda: released_training(2000))
    """Training on a small set; the defaults are the released code's."""
    whole_epochs: int = 60
    """Epochs on the whole training set."""
    whole_repeats: int | None = None
    """Networks trained on the whole training set. None: as many as on the others."""

    def runs(self, name: str) -> int:
        """Networks trained on a set."""
        return (name == "whole" and self.whole_repeats) or self.repeats

    def __post_init__(self) -> None:
        for name in ("repeats", "whole_epochs", "whole_repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise ValueError(f"sets must name one or more, each once, got {list(self.sets)}")
        if self.best_on_test_every < 0:
            raise ValueError(
                f"best_on_test_every must not be negative, got {self.best_on_test_every}"
            )


@dataclass(frozen=True)
class Protocol:
    """Options that a protocol sets."""

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
    """Options of a protocol: dotted name -> value. Raises ValueError if it does not exist."""
    protocol: Protocol = lookup("evaluate.protocol", name, PROTOCOLS)
    options = _options(protocol.evaluate, protocol.curate)
    del options["evaluate.networks"]
    return {**options, "evaluate.protocol": name}


def protocol_changes(evaluate: EvaluateConfig, curate: CurateConfig) -> list[str]:
    """The options whose values differ from the configuration's protocol."""
    options = _options(evaluate, curate)
    settings = protocol_settings(evaluate.protocol)
    return [name for name, value in settings.items() if options[name] != value]


def _options(evaluate: EvaluateConfig, curate: CurateConfig) -> dict[str, Any]:
    return dotted({"evaluate": dataclasses.asdict(evaluate), "curate": dataclasses.asdict(curate)})
