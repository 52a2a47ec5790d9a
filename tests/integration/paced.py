"""A frequency law that takes its time while a file exists, so that a test can hold back a run."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from ncfm.frequencies import FrequencyConfig, gaussian_law


def law(config: FrequencyConfig, generator: torch.Generator) -> Tensor:
    """The Gaussian kernel's, slowly while the file named by $NCFM_HOLD exists."""
    if Path(os.environ["NCFM_HOLD"]).exists():
        time.sleep(0.2)
    return gaussian_law(config, generator)
