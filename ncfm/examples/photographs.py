"""Distil, look and train, in cells for a notebook or an editor.

Or `python -m ncfm.examples.photographs`, half a minute on one CPU core. The classes are six
photographs of scikit-image, their images crops of these. With your own data, give `ncfm.distill` a
torchvision Dataset.
"""
# The directory has no __init__.py: whoever imports all modules of ncfm must not run this.

# %% Real images: crops of the left of a photograph for training, of its right for the test
import numpy as np
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

import ncfm
from ncfm.models import ModelConfig

NAMES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "rocket")


def crops(part: slice, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 images from this part of the photographs' width, and their labels."""
    random, images = np.random.default_rng(seed), []
    for name in NAMES:
        photograph = getattr(data, name)()
        columns = range(photograph.shape[1])[part]
        for _ in range(count):
            x = random.integers(columns[0], columns[-1] - 64)
            y = random.integers(photograph.shape[0] - 64)
            images.append(photograph[y : y + 64 : 2, x : x + 64 : 2])
    labels = torch.arange(len(NAMES)).repeat_interleave(count)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


images, labels = crops(slice(0, 250), 200, seed=0)
test_images, test_labels = crops(slice(-200, None), 50, seed=1)

# %% Distil: one stored image per class, which holds four small ones
model = ModelConfig(width=32)
synthetic = ncfm.distill(
    images, labels, ipc=1, class_names=NAMES, model=model, num_steps=150, real_batch=64
)
synthetic.save("example-ipc1")  # ncfm.load("example-ipc1") reads it

# %% Look: a row per class, as a network sees them; the same picture is example-ipc1/gallery.png
learned, learned_labels = synthetic.decode()
gallery = make_grid(learned, nrow=synthetic.factor**2, padding=1)
save_image(gallery.repeat_interleave(4, 1).repeat_interleave(4, 2), "example-ipc1/gallery.png")
gallery.permute(1, 2, 0).numpy()


# %% Train a network of your own on them, and one on as many real images
def accuracy(train_images: Tensor, train_labels: Tensor, epochs: int = 200) -> float:
    """Test accuracy of a fresh network."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.AvgPool2d(4)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.AvgPool2d(4)),
        *(nn.Flatten(), nn.Linear(256, len(NAMES))),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        loss = F.cross_entropy(network(train_images), train_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = network(test_images / 255).argmax(1)
    return float((predicted == test_labels).float().mean())


chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: len(learned)]
distilled_accuracy = accuracy(learned, learned_labels)
random_accuracy = accuracy(images[chosen] / 255, labels[chosen])
print(f"test accuracy from {len(learned)} learned images: {distilled_accuracy:.1%}")  # noqa: T201
print(f"from as many random real ones: {random_accuracy:.1%}")  # noqa: T201
