"""ncfm's training without what makes it fast on CPUs: the baseline of the training benchmarks."""

from importlib import import_module
from typing import Any

from reference_loop import plain

from ncfm.models import Classifier, ModelConfig, build_model


def without_kernels() -> None:
    """Train and test with the network's layers, in this process."""
    for module in modules():
        module.kernel_logits = lambda *_, **__: None


def as_plain_pytorch() -> None:
    """In this process: PyTorch's own layers, malloc as it is, whole batches."""
    without_kernels()
    training, evaluation = modules()
    training.keep_freed_memory = lambda: False
    training.PART_PIXELS = 2**40
    evaluation.build_model = plain_model


def modules() -> tuple[Any, Any]:
    """ncfm.train and ncfm.evaluate; functions of the package have the same names."""
    return import_module("ncfm.train"), import_module("ncfm.evaluate")


def plain_model(config: ModelConfig, **options: Any) -> Classifier:
    """As `build_model`, in PyTorch's own layers."""
    return plain(build_model(config, **options))
