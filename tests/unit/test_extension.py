"""An objective, a frequency law and a network of a user's own: one new module each, named by its
dotted path or by an entry of the registry.

Each of the added parts takes the gradient of the images away: where it is used, they stay as they
started, and with the built-in parts they do not.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ncfm
from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig
from ncfm.frequencies import LAWS, FrequencyConfig
from ncfm.models import NETWORKS, ModelConfig
from ncfm.objectives import OBJECTIVES
from ncfm.train import TrainConfig

MODULE = '''
import torch
from ncfm.models import Classifier
from ncfm.objectives import Objective


class Still(Objective):
    """No distance at all."""

    name = "still"

    def __call__(self, x, y):
        return torch.zeros(len(y)), [torch.zeros_like(part) for part in y]


def zero_law(config, generator):
    """All characteristic functions are 1 at t = 0."""
    return torch.zeros(config.num_freqs, device=generator.device)


class Blind(Classifier):
    """The same features of all images."""

    def __init__(self, config, *, num_classes, channels, image_size):
        super().__init__(torch.nn.Identity(), 16, num_classes)

    def features(self, x):
        return 0 * x.flatten(1)[:, :16] + torch.arange(16, device=x.device)
'''


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module."""
    (tmp_path / "parts_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("parts_of_a_user")
    monkeypatch.delitem(importlib.sys.modules, "parts_of_a_user")  # type: ignore[attr-defined]


def distilled(steps: int, **names: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    made = ncfm.distill(
        images,
        torch.arange(12) % 2,
        model=ModelConfig(name=names.get("network", "convnet"), width=16, depth=1),
        settings=ncfm.Settings(
            networks=1,
            training=TrainConfig(epochs=1),
            distill=DistillConfig(
                num_steps=steps,
                real_batch=4,
                lr=0.1,
                calibration=0.0,
                weight_decay=0.0,
                objective=names.get("objective", "ncfd"),
            ),
            frequencies=FrequencyConfig(num_freqs=16, sampler=names.get("sampler", "gaussian")),
            augment=AugmentConfig(strategy="none"),
        ),
        report=None,
    )
    return made.images


@pytest.mark.parametrize("by", ["dotted path", "registry"])
@pytest.mark.parametrize(
    ("option", "name", "registry"),
    [
        ("objective", "Still", OBJECTIVES),
        ("sampler", "zero_law", LAWS),
        ("network", "Blind", NETWORKS),
    ],
)
def test_an_added_part_is_used(
    option: str,
    name: str,
    registry: dict[str, Any],
    by: str,
    parts: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if by == "registry":
        monkeypatch.setitem(registry, "mine", getattr(parts, name))
    chosen = "mine" if by == "registry" else f"parts_of_a_user.{name}"
    torch.testing.assert_close(
        distilled(3, **{option: chosen}), distilled(1, **{option: chosen}), rtol=0, atol=1e-6
    )


def test_built_in_parts_move_the_images() -> None:
    """Negative control."""
    assert (distilled(3) - distilled(1)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda name: DistillConfig(objective=name), "ncfd, mmd, mmd_raw"),
        (lambda name: FrequencyConfig(sampler=name), "gaussian, mixture, matern, imq, psi"),
        (lambda name: ModelConfig(name=name), "convnet, alexnet, vgg11, resnet18"),
    ],
)
def test_unknown_names(make: Any, known: str) -> None:
    with pytest.raises(ValueError, match=f"must be one of {known},.*package.module.Class.*'other'"):
        make("other")
    for path in ("no_such_module.Class", "ncfm.objectives.NoSuchClass"):
        with pytest.raises(ValueError, match=f"'{path}' cannot be imported"):
            make(path)
