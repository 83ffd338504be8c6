"""Classify images in the workers of a PyTorch DataLoader, for example to filter a data set.

CONVOY_ADDRESS=127.0.0.1:8001 python examples/dataloader_workers.py seven.png …
"""

import sys
from collections.abc import Sequence

from torch.utils.data import DataLoader, Dataset

from convoy.client import Client


class Classified(Dataset[tuple[str, str]]):
    """Paths with their labels. The client is pickled to each worker and connects there."""

    def __init__(self, paths: Sequence[str], client: Client) -> None:
        self._paths = paths
        self._client = client

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, str]:
        path = self._paths[index]
        return path, self._client.classify(path).best.label


def main(paths: Sequence[str]) -> None:
    # A forked worker could not use the client: gRPC's threads stay in the parent.
    with Client() as client:
        loader = DataLoader(
            Classified(paths, client), batch_size=8, num_workers=2, multiprocessing_context="spawn"
        )
        for names, labels in loader:
            for name, label in zip(names, labels, strict=True):
                print(name, label)


if __name__ == "__main__":
    main(sys.argv[1:])
