"""Matrix products at the speed of convolutions."""

import torch
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, without autograd. In float32 on a CPU by oneDNN, as convolutions are: on
    AMD's processors MKL, which `@` asks, is half as fast.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32 or not ONEDNN or not a.numel():
        return a @ b
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return result
