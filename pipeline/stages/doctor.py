"""Stage doctor: resources of this machine that a run would use, and missing ones."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from ncfm.backend.library import library
from pipeline.graph import Action, log
from pipeline.runtime.workers import available_cores, joins

EXTRAS = {"optuna": "tune.sampler optuna", "mlflow": "tracking.mlflow", "wandb": "tracking.wandb",
    "s3fs": "s3://", "gcsfs": "gs://", "huggingface_hub": "hf://, source.kind hf"}  # fmt: skip
"""Package of an extra -> the option or URI that needs it."""


class Doctor(Action):
    """Print the diagnosis; nothing is started or written."""

    name = "doctor"
    writes = False

    def perform(self) -> None:
        """See Action."""
        lines = diagnosis(self.config.storage)
        width = max(map(len, lines))
        for name, text in lines.items():
            log(f"{name.ljust(width)}  {text}")


def diagnosis(storage: object) -> dict[str, str]:
    """Resource -> its state, with the remedy if it is missing."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    missing = [f"{name} ({use})" for name, use in EXTRAS.items() if find_spec(name) is None]
    return {
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": f"{available_cores()}: a worker each, unless there are GPUs",
        "GPUs": ", ".join(gpus) or _why_no_gpu(),
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none: the CPU build'}",
        "C++ compiler": _compiler(),
        "Ray": f"{_version('ray')}, {_cluster()}",
        "disk": _disk(storage),
        "extras missing": ", ".join(missing) or "none",
    }


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "none that this build of PyTorch can use; install one for CUDA if there is a GPU"
    return "none: the run uses the CPU"


def _compiler() -> str:
    if library() is None:
        return "none that works ($CXX, or c++): steps and training take two to three times as long"
    return "works: the native kernels are used on CPUs"


def _cluster() -> str:
    if joins():
        return f"joins the cluster at {os.environ['RAY_ADDRESS']}"
    return "starts a cluster on this machine (RAY_ADDRESS names another)"


def _disk(storage: object) -> str:
    if not isinstance(storage, Path):
        return f"storage_path {storage} is an object store"
    place = next(path for path in (storage, *storage.parents) if path.exists())
    writable = "" if os.access(place, os.W_OK) else ", NOT writable: choose another --storage_path"
    return f"{shutil.disk_usage(place).free / 2**30:,.0f} GiB free at {storage}{writable}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed in {sys.prefix}"
