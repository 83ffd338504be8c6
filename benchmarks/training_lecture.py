"""Wall time of the lecture's own training of `Net`, step by step as its slides have it.

    python benchmarks/training_lecture.py DATA --epochs 10 --seeds 0 1 2

DATA is a folder of images as for `convoy-train --data imagefolder:DATA`. Images are PIL pictures in
memory, turned into tensors one by one by the slides' transforms, in two workers; the loop, the two
writers' calls and validation on the test images with gradients are the slides'. Spelling mistakes
that stop it (`ReduceLRonPlateau`) are mended, slower or wrong ways of doing things are not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms

from convoy.training import nets
from convoy.training.data import ImageSet, Preprocessing
from convoy.training.data.decoding import decode
from convoy.training.data.folder import list_images

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 does with its array of pixels."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images.images[index])
        return self.transform(picture), int(self.images.labels[index])


def train_epoch(net, loader, optimizer, scheduler, loss_fn, epoch, writer):  # noqa: PLR0917
    train_loss, total = torch.zeros(()), 0
    for samples, labels in loader:
        outputs = net(samples)
        loss = loss_fn(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += samples.shape[0]
        train_loss += loss.sum().detach()
    train_loss /= total
    scheduler.step(train_loss)
    writer.add_scalars("Loss", {"train": train_loss.item()}, epoch)


def valid_epoch(net, loader, loss_fn, epoch, writer):
    accuracy, validation_loss, total = torch.zeros(()), torch.zeros(()), 0
    for samples, labels in loader:
        outputs = net(samples)
        loss = loss_fn(outputs, labels)
        predictions = outputs.argmax(dim=1)
        accuracy += (predictions.type(labels.dtype) == labels).float().sum()
        total += samples.shape[0]
        validation_loss += loss.sum()
    validation_loss /= total
    writer.add_scalars("Loss", {"valid": validation_loss.item()}, epoch)
    writer.add_scalar("Accuracy", (accuracy / total).item(), epoch)
    return (accuracy / total).item()


def train(sets: Sequence[Pictures], epochs: int, seed: int) -> float:
    """Trains `Net` as the slides do; returns the last epoch's test accuracy."""
    torch.manual_seed(seed)
    train_loader = DataLoader(sets[0], batch_size=64, shuffle=True, num_workers=2)
    valid_loader = DataLoader(sets[1], batch_size=64, shuffle=False, num_workers=2)
    net = nets.create("net")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    loss_fn = nn.CrossEntropyLoss()
    accuracy = 0.0
    with tempfile.TemporaryDirectory() as logs, SummaryWriter(logs) as writer:
        for epoch in range(epochs):
            began = time.perf_counter()
            train_epoch(net, train_loader, optimizer, scheduler, loss_fn, epoch, writer)
            accuracy = valid_epoch(net, valid_loader, loss_fn, epoch, writer)
            took_s = time.perf_counter() - began
            print(
                f"seed {seed}, epoch {epoch + 1}: {took_s:.1f} s, test accuracy {accuracy:.4f}",
                flush=True,
            )
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    sets = [
        Pictures(decode(list_images(options.data / part), Preprocessing(), None)[0])
        for part in ("train", "test")
    ]
    results = [train(sets, options.epochs, seed) for seed in options.seeds]
    spread = statistics.stdev(results) if len(results) > 1 else 0.0
    print(f"{statistics.mean(results):.4f} ± {spread:.4f} over {len(results)} seeds")


if __name__ == "__main__":
    main()
