"""A GPU that computes nothing: PyTorch's fake tensors in its place.

    python tests/unit/fake_gpu.py

What is on "cuda" has a shape, a dtype and a device, but no values; what is on the CPU is computed.
So code meant for a GPU runs where there is none, operations on tensors of several devices fail as
they do there, and every time that the CPU would have to wait for the GPU is noted. Prints what
`findings` found as JSON. It wants a process of its own: fake tensors tell autograd for good that
there is a GPU.
"""

import contextlib
import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ncfm.augment import AugmentConfig
from ncfm.distill import DistillConfig, Distiller
from ncfm.extractors import ExtractorPool
from ncfm.frequencies import FrequencyConfig
from ncfm.images import ImageSource, ImageSpec, InMemoryImages
from ncfm.models import Classifier, ModelConfig, build_model
from ncfm.seeding import keyed_generator
from ncfm.synthetic import SyntheticSet
from ncfm.train import TrainConfig, train
from pipeline.data.batches import ClassBatches

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
CLASSES, SIZE, REAL, IPC = 3, 16, 12, 2
SPEC = ImageSpec(
    channels=3, image_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=("a", "b", "c")
)


class FakeGPU(FakeTensorMode):
    """While it is entered, tensors on "cuda" are fake. `waits` has a function of the project for
    each time that one of them had to be waited for. What has as many elements as the GPU finds, as
    nonzero and indexing by a mask, fails.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("meta")  # to autograd, which would ask for a GPU's streams
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        to = torch.device(kwargs.get("device") or "cpu")
        if to.type == "meta":
            kwargs["device"] = to = GPU
        if not fake and to.type == "cpu":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait()
            return fake[0].dtype == torch.bool or 0.5
        if func is aten._to_copy.default and "device" in kwargs:
            if to.type == "cpu":
                self._wait()
                return torch.zeros(fake[0].shape, dtype=kwargs.get("dtype") or fake[0].dtype)
            if not fake and not kwargs.get("non_blocking"):
                self._wait()
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        if func is aten.copy_.default and len(devices) > 1 and args[2:] != (True,):
            self._wait()
        if func in (aten.index.Tensor, aten.index_put_.default) and len(devices) > 1:
            self._wait()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _wait(self) -> None:
        ours = [
            frame.name
            for frame in traceback.extract_stack()
            if Path(frame.filename).parent.name in ("ncfm", "pipeline")
        ]
        self.waits.append(ours[-1] if ours else "elsewhere")


class FakeGenerator(torch.Generator):
    """Of numbers on the fake GPU, where nothing is drawn."""

    device = GPU


def fake_generator(*keys: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """`keyed_generator`, which has one for a real GPU alone."""
    if torch.device(device).type == "cuda":
        return FakeGenerator()
    return keyed_generator(*keys)


def network(seed: int) -> Classifier:
    config = ModelConfig(depth=2, width=8)
    return build_model(config, num_classes=CLASSES, channels=3, image_size=SIZE, seed=seed)


def distiller(**changes: Any) -> Distiller:
    frequencies = FrequencyConfig(
        sampler="psi", num_freqs=64, num_components=4, ascents=changes.pop("ascents", 1)
    )
    pairs = [(network(i).state_dict(), network(10 + i).state_dict()) for i in range(2)]
    return Distiller(
        {c: torch.rand(IPC, 3, SIZE, SIZE) for c in range(CLASSES)},
        factor=2,
        spec=SPEC,
        pool=ExtractorPool(network(0), pairs, device=GPU),
        seed=0,
        config=DistillConfig(compile=False, **changes),
        frequencies=frequencies,
        augment=AugmentConfig(),
        device=GPU,
    )


def step_waits(gpu: FakeGPU, **changes: Any) -> list[str]:
    """Where the second step waited."""
    loop = distiller(**changes)
    real = {c: torch.randint(256, (REAL, 3, SIZE, SIZE)).byte() for c in range(CLASSES)}
    loop.update(real)
    gpu.waits.clear()
    loop.update(real)
    return list(gpu.waits)


def train_waits(gpu: FakeGPU, batches: int, *, decoded: bool = False) -> list[str]:
    """Where a training of two epochs waited: on real images in memory, or on a synthetic set."""
    images = torch.randint(256, (batches * 4, 3, SIZE, SIZE)).byte()
    labels = torch.arange(len(images)) % CLASSES
    data: ImageSource = InMemoryImages(images, labels)
    if decoded:
        stored = images[:batches] / 255
        data = SyntheticSet(stored, labels[:batches], 2, SPEC).source(device=GPU)
    config = TrainConfig(epochs=2, batch_size=4, cutmix_prob=0.5, optimizer="adamw")
    model = network(0)
    gpu.waits.clear()
    train(model, data, SPEC, config, seed=0, device=GPU)
    return list(gpu.waits)


class FakeStore:
    """Of CLASSES classes of ten images each, with nothing in them."""

    size = CLASSES * 10 * 3 * SIZE**2  # bytes

    def images(self, split: str, classes: Sequence[int]) -> dict[int, Tensor]:
        return {c: torch.zeros(10, 3, SIZE, SIZE).byte() for c in classes}


def pool_waits(gpu: FakeGPU, free: int) -> tuple[list[str], list[str]]:
    """Where batches were, with so much memory free on the GPU, and where the CPU waited for it once
    the images were there.
    """
    with mock.patch("torch.cuda.mem_get_info", return_value=(free, free)):
        source = ClassBatches(
            FakeStore(),  # type: ignore[arg-type]
            range(CLASSES),
            0,
            device=GPU,
        )
    gpu.waits.clear()
    batches = [source.batch(c, step, 4) for step in range(3) for c in range(CLASSES)]
    return sorted({batch.device.type for batch in batches}), list(gpu.waits)


def control_waits(gpu: FakeGPU) -> dict[str, list[str]]:
    """What waits for a GPU, as far as the project could do it."""
    x, index = torch.ones(4, device=GPU), torch.tensor([0, 1])
    controls: dict[str, Callable[[], object]] = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "bool": lambda: bool((x > 0).all()),
        "cpu": lambda: x.cpu(),
        "to": lambda: index.to(GPU),
        "tensor": lambda: torch.tensor((1.0, 2.0), device=GPU),
        "new_tensor": lambda: x.new_tensor((1.0, 2.0)),
        "index": lambda: x[index],
        "put": lambda: x.__setitem__(index, x[:2]),
        "copy": lambda: x[:2].copy_(index),
    }
    found = {}
    for name, control in controls.items():
        gpu.waits.clear()
        control()
        found[name] = list(gpu.waits)
    return found


def mixing_fails() -> bool:
    """Whether an operation on both devices fails."""
    try:
        torch.ones(2, device=GPU) + torch.ones(2)
    except RuntimeError:
        return True
    return False


def findings() -> dict[str, Any]:
    gpu = FakeGPU()
    patches = (
        mock.patch("ncfm.psi.keyed_generator", fake_generator),
        mock.patch("ncfm.train.global_generator", return_value=contextlib.nullcontext()),
        mock.patch("torch.Tensor.pin_memory", lambda tensor: tensor),
        gpu,
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return {
            "controls": control_waits(gpu),
            "mixing_fails": mixing_fails(),
            "steps": {
                name: step_waits(gpu, **changes)
                for name, changes in {
                    "default": {},
                    "graphs made again": {"graph_images": 1},
                    "inner steps": {"inner_steps": 2},
                    "ascents": {"ascents": 2},
                    "mmd": {"objective": "mmd"},
                    "bfloat16": {"precision": "bfloat16"},
                    "clipped": {"clip_grad_value": 1.0, "clip_grad_norm": 1.0},
                }.items()
            },
            "training": [train_waits(gpu, batches) for batches in (2, 4)],
            "training on decoded": [train_waits(gpu, batches, decoded=True) for batches in (2, 4)],
            "pools": {
                "resident": pool_waits(gpu, free=4 * FakeStore.size),
                "too large": pool_waits(gpu, free=4 * FakeStore.size - 1),
            },
        }


if __name__ == "__main__":
    print(json.dumps(findings()))
