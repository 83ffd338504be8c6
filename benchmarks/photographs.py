"""Makes the data of a benchmark at 224 x 224 px without a download: photographs and a net.

    python -m benchmarks.photographs OUT --images 2000 --architecture resnet50

Writes JPEG cuttings, of odd sizes, of scikit-learn's two photographs as
OUT/photos/SPLIT/CLASS/N.jpg, random weights of a torchvision net as OUT/ARCHITECTURE.pt, and
OUT/labels.txt. No runtime's speed depends on the weights.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from convoy.training import nets

NAMES = ("china", "flower")
SHARES = {"train": 0.8, "test": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--architecture", default="resnet50")
    arguments = parser.parse_args()
    write_photographs(arguments.out / "photos", arguments.images)
    torch.manual_seed(0)
    net = nets.create(arguments.architecture, n_classes=len(NAMES), image_size=224)
    settle(net)
    torch.save(net.state_dict(), arguments.out / f"{arguments.architecture}.pt")
    (arguments.out / "labels.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")


def write_photographs(root: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for split, share in SHARES.items():
        for name, pixels in zip(NAMES, load_sample_images().images, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(round(share * count / len(NAMES))):
                height, width = random.integers(240, 420, 2) | 1
                top, left = (random.integers(0, n) for n in (428 - height, 641 - width))
                cutting = Image.fromarray(pixels[top : top + height, left : left + width])
                cutting.save(folder / f"{index}.jpg", quality=int(random.integers(70, 96)))


def settle(net: torch.nn.Module) -> None:
    """Set batch norms to the statistics of noise; with the initial ones the signal may diverge."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(8, 3, 224, 224))
    net.eval()


if __name__ == "__main__":
    main()
