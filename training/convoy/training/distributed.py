"""The processes of one training run: a single one, or those that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Group:
    """The rank of this process and the number of processes. A group of one does not communicate.

    Every process computes the same order and random numbers and takes its share of each batch, so
    the batch size of a recipe is that of all processes together.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Every size-th element of a batch `[N, ...]`, starting with the rank-th."""
        return batch[self.rank :: self.size]

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the net to call in training: gradients are averaged over the processes.

        On CUDA, batch norm uses the statistics of the whole batch. PyTorch has no synchronized
        batch norm for the CPU, where each process uses those of its share.
        """
        if self.size == 1:
            return net
        parameter = next(net.parameters())
        if parameter.is_cuda:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(net, [parameter.device] if parameter.is_cuda else None)

    def add_up(self, totals: Tensor) -> None:
        """Replace `totals` with its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(totals)

    def gather(self, share: Tensor, total: int) -> Tensor:
        """Merge the shares `[M, K]` of a batch of `total` rows, on the CPU."""
        if self.size == 1:
            return share
        parts: list[Tensor] = [share] * self.size
        dist.all_gather_object(parts, share)
        whole = share.new_empty((total, *share.shape[1:]))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def same_buffers(self, net: nn.Module) -> None:
        """Send the first process's buffers, such as batch norm's statistics, to all others."""
        if self.size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def from_first(self, value: _Value) -> _Value:
        """Return the first process's value; the others' values are ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Run the block first in the first process, then in the others."""
        if self.size > 1 and not self.is_first:
            dist.barrier()
        yield
        if self.size > 1 and self.is_first:
            dist.barrier()


def is_first_process() -> bool:
    """Return whether this process reports for the run, by torchrun's environment."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Return the index of this process's GPU on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def join_group(device: torch.device) -> Iterator[Group]:
    """Join the other processes that torchrun started, by NCCL on CUDA and Gloo on the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
