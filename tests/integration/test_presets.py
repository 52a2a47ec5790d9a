"""Every cell of the paper: its preset parses, builds its networks, and takes a step."""

import re

import pytest
import torch

from ncfm.distill import Distiller
from ncfm.extractors import ExtractorPool
from ncfm.images import ImageSpec
from ncfm.models import build_model
from ncfm.seeding import keyed_generator
from ncfm.synthetic import initial_images
from pipeline.cli import PRESETS, parse_command
from pipeline.config import RunConfig

# data set -> (classes, channels, image size, depth, IPCs); the paper's section 5 and DC's table 1.
CELLS = {
    "cifar10": (10, 3, 32, 3, (1, 10, 50)),
    "cifar100": (100, 3, 32, 3, (1, 10, 50)),
    "tinyimagenet": (200, 3, 64, 4, (1, 10, 50)),
    "fashionmnist": (10, 1, 28, 3, (1, 10, 50)),
    "imagenet1k": (1000, 3, 224, 6, (1, 10, 50)),
    "imagenet100": (100, 3, 224, 6, (10,)),
    **{
        f"image{subset}": (10, 3, 128, 5, (1, 10))
        for subset in ("nette", "woof", "fruit", "meow", "squawk", "yellow")
    },
}
NAMES = [f"{data}_ipc{ipc}" for data, (*_, ipcs) in CELLS.items() for ipc in ipcs]


def config_of(name: str, *overrides: str) -> RunConfig:
    path = ["--source.path", "somewhere"] if _kind(name) == "folder" else []
    preset = str(PRESETS / f"{name}.toml")
    return parse_command(["--config", preset, *path, *overrides]).config


def _kind(name: str) -> str:
    found = re.search(r'^kind = "(\w+)"', (PRESETS / f"{name}.toml").read_text(), re.MULTILINE)
    assert found, f"{name} names no source"
    return found[1]


def test_every_cell_has_a_preset() -> None:
    assert {path.stem for path in PRESETS.glob("*_ipc*.toml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_preset_is_the_cell_it_says(name: str) -> None:
    data, _, ipc = name.rpartition("_ipc")
    classes, channels, size, depth, _ = CELLS[data]
    config = config_of(name)
    assert (config.ipc, config.synthetic.factor) == (int(ipc), 2)
    assert (config.shard.channels, config.shard.image_size) == (channels, size)
    with torch.device("meta"):
        network = build_model(config.model, num_classes=classes, channels=channels, image_size=size)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == depth
    # 128 channels x 4 x 4, the paper's D; 3 x 3 are left of 224 px
    assert network.num_features == (1152 if size == 224 else 2048)
    header = (PRESETS / f"{name}.toml").read_text().partition("\nipc =")[0]
    assert f"python pipeline/run.py --config pipeline/presets/{name}.toml" in header
    assert "Aims at" in header
    assert re.search(
        r"^# Measured: [\d.]+ ± |^# Not run: .*about [\d,]+ (hours|days)", header, re.MULTILINE
    )
    assert all(line.startswith("#") for line in header.splitlines())


SMALL = [
    *("--ipc", "1", "--model.width", "4"),
    *("--distill.real_batch", "2", "--distill.compile", "false"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_preset_takes_a_step(name: str) -> None:
    """On random images, with fewer channels and images, of ten of its classes at most (the share of
    one worker of many), not compiled; all else is the preset's.
    """
    classes, channels, size, _, _ = CELLS[name.rpartition("_ipc")[0]]
    config = config_of(name, *SMALL)
    spec = ImageSpec(
        channels=channels,
        image_size=size,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        class_names=tuple(map(str, range(classes))),
    )
    networks = [
        build_model(
            config.model, num_classes=classes, channels=channels, image_size=size, seed=seed
        )
        for seed in range(2)
    ]
    states = [network.state_dict() for network in networks]
    own = range(min(classes, 10))
    shape = (len(own), 4, channels, size, size)
    real = torch.randint(0, 256, shape, generator=keyed_generator(0, "real"), dtype=torch.uint8)
    distiller = Distiller(
        {
            c: initial_images(real[c], 1, config.synthetic, keyed_generator(0, "start", c))
            for c in own
        },
        factor=config.synthetic.factor,
        spec=spec,
        pool=ExtractorPool(networks[0], [(states[0], states[1])]),
        seed=config.seed,
        config=config.distill,
        frequencies=config.frequencies,
        augment=config.augment,
        num_classes=classes,
    )
    before = {c: images.detach().clone() for c, images in distiller.images.items()}
    metrics = distiller.update({c: real[c, :2] for c in own})
    assert set(metrics) == {"ncfd", "calibration"}
    assert all(torch.isfinite(value) for value in metrics.values())
    for c, images in distiller.images.items():
        assert not torch.equal(images, before[c])
        assert 0 <= float(images.detach().min()) <= float(images.detach().max()) <= 1
