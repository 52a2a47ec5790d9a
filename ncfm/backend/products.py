"""Matrix products through oneDNN."""

import torch
from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, or batches of them, without autograd. Single float32 matrices on a CPU go
    through oneDNN, as convolutions do: on AMD processors MKL, which `@` uses, is half as fast.
    """
    if a.ndim == 3 and len(a) == 1:
        return product(a[0], b[0] if b.ndim == 3 else b)[None]
    if (
        a.device.type != "cpu"
        or a.dtype != torch.float32
        or a.ndim != 2
        or not ONEDNN
        or not a.numel()
    ):
        return a @ b
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return result
