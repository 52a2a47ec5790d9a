"""ConvNet-D, the network that dataset distillation reports its results on (DC, 2021)."""

from torch import nn

from ncfm.models.classifier import Classifier
from ncfm.models.layers import AveragePool, Norm, first_padding, norm_layer, padded_size


def default_depth(image_size: int) -> int:
    """The literature's depth at an image size in px: 3 up to 32, 4 to 64, 5 to 128, 6 above."""
    return 3 + sum(image_size > limit for limit in (32, 64, 128))


class ConvNet(Classifier):
    """`depth` blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling.

    num_features = width * side^2, the side being that of the images, halved `depth` times.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        depth: int,
        width: int,
        norm: Norm,
    ) -> None:
        """Raises ValueError, saying what depth fits, if images cannot be halved `depth` times."""
        size = padded_size(image_size)
        side = size >> depth
        if side < 1:
            largest = size.bit_length() - 1
            advice = f"depth {largest} is the largest that fits" if largest else "no depth fits"
            raise ValueError(
                f"a ConvNet of depth {depth} needs images of at least {2**depth} px, "
                f"got {image_size}; {advice}"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            inputs = width if block else channels
            padding = 1 if block else first_padding(3, image_size)
            layers += [
                nn.Conv2d(inputs, width, 3, padding=padding),
                norm_layer(norm, width),
                nn.ReLU(inplace=True),
                AveragePool(size >> block),
            ]
        super().__init__(nn.Sequential(*layers), width * side**2, num_classes)
