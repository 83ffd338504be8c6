"""The training itself: epochs of steps, validation after each, the best weights kept.

Every epoch draws its random numbers from a seed of its own, so a run resumed after epoch n goes on
exactly as one that never stopped, and equal seeds give equal weights on a CPU.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from training.augment import cutout, draw, move, scale
from training.distributed import Group
from training.errors import DivergedError, RecipeError
from training.evaluate import Evaluation, predict
from training.inputs import Normalization
from training.optim import make_average, make_optimizer, penalty
from training.readers import Reader
from training.recipe import Recipe
from training.schedules import rate_factor, size_px

_EVALUATED_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class EpochResult:
    """What one epoch gave; losses are means of a sample, without the penalty."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    penalty: float
    lr: float
    images_per_s: float


class Trainer:
    """Trains one net.

    Args:
        net: On the device of the batches.
        recipe: How.
        normalization: Of the pixels.
        train: What to learn from.
        valid: Drives the plateau schedule and chooses the best epoch.
        group: The processes that train together.

    Raises:
        RecipeError: A batch is larger than the training set.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        normalization: Normalization,
        train: Reader,
        valid: Reader,
        *,
        group: Group | None = None,
    ) -> None:
        self._count = len(train.labels)
        if recipe.batch_size > self._count:
            raise RecipeError(
                f"batch_size: expected at most the {self._count} training images, "
                f"got {recipe.batch_size}"
            )
        self._net = net.to(memory_format=torch.channels_last)
        self._recipe = recipe
        self._normalization = normalization
        self._train, self._valid = train, valid
        self._group = group or Group()
        self._optimizer = make_optimizer(net, recipe)
        self._plateau = ReduceLROnPlateau(self._optimizer)
        self._average = make_average(net, recipe)
        wrapped = self._group.wrap(net)
        self._forward = torch.compile(wrapped) if recipe.compile else wrapped
        device = train.labels.device
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=_in_bfloat16(recipe, device)
        )
        draws = torch.Generator().manual_seed(recipe.seed)
        self._coins = torch.randint(2, (self._count,), generator=draws)  # [N]
        self.steps_per_epoch = len(self._split(torch.arange(self._count)))
        self._step = 0
        self.epoch = 0

    @property
    def net(self) -> nn.Module:
        """What is evaluated and kept: the average where the recipe has one."""
        return self._average.net if self._average else self._net

    def run_epoch(self, on_step: Callable[[], None]) -> EpochResult:
        """Trains on every batch once, then validates.

        Raises:
            DivergedError: The loss is NaN or infinite.
        """
        began = time.perf_counter()
        _training_mode(self._net)
        device = self._train.labels.device
        totals = torch.zeros(4, dtype=torch.float64, device=device)
        for images, labels, share in self._batches():
            totals += self._step_on(images, labels, share)
            on_step()
        self._group.add_up(totals)
        # The first and only wait for the device in an epoch.
        loss, correct, extra, samples = totals.tolist()
        images_per_s = samples / (time.perf_counter() - began)
        self._group.same_buffers(self.net)
        valid = self.evaluate(self._valid)
        rate = self._optimizer.param_groups[0]["lr"]
        self._check_finite(loss, valid.loss)
        if self._recipe.schedule == "plateau":
            self._plateau.step(valid.loss)
        self.epoch += 1
        return EpochResult(
            epoch=self.epoch,
            train_loss=loss / samples,
            train_accuracy=correct / samples,
            valid_loss=valid.loss,
            valid_accuracy=valid.accuracy,
            penalty=extra / samples,
            lr=rate,
            images_per_s=round(images_per_s, 1),
        )

    def evaluate(self, reader: Reader) -> Evaluation:
        """Scores the weights that would be kept, in float32, on all images of a reader."""
        total = len(reader.labels)
        mine = self._group.share(torch.arange(total))
        batches = map(self._normalization.apply, reader.read(torch.split(mine, _EVALUATED_AT_ONCE)))
        logits = self._group.gather(predict(self.net, batches), total)
        return Evaluation(logits, reader.labels.cpu())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened."""
        return {
            "epoch": self.epoch,
            "step": self._step,
            "net": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "plateau": self._plateau.state_dict(),
            "average": self._average.state_dict() if self._average else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            RecipeError: It belongs to another net or recipe.
        """
        try:
            self._net.load_state_dict(state["net"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._plateau.load_state_dict(state["plateau"])
            if self._average:
                self._average.load_state_dict(state["average"])
            self.epoch, self._step = state["epoch"], state["step"]
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"resume: the run was started with other settings: {reason}"
            ) from error

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """This process's part of each batch, augmented.

        Yields:
            Images `[N, 3, H, W]` float32, labels `[N]`, and the weight of their mean in the mean
            over all processes' parts.
        """
        recipe, group = self._recipe, self._group
        seed = recipe.seed * 1_000_003 + self.epoch
        torch.manual_seed(seed + group.rank)  # dropout
        random = torch.Generator().manual_seed(seed)
        batches = self._split(torch.randperm(self._count, generator=random))
        mine = [group.share(batch) for batch in batches]
        for batch, indices, pixels in zip(batches, mine, self._train.read(mine), strict=True):
            draws = draw(recipe, self._coins[batch], self.epoch, random)
            draws = draws[group.rank :: group.size]
            size = size_px(recipe, self._done)
            images = self._normalization.apply(scale(move(pixels, draws), size))
            if draws.centres is not None:
                shrunk = size / recipe.image_size
                centres = (draws.centres * shrunk).long()
                images = cutout(images, centres, round(recipe.cutout_px * shrunk))
            labels = self._train.labels[indices.to(images.device)]
            weight = len(indices) * group.size / len(batch)
            yield images.contiguous(memory_format=torch.channels_last), labels, weight

    def _split(self, order: Tensor) -> list[Tensor]:
        """Batches of indices; a last one that leaves a process one image or none is left out.

        Batch norm needs two images.
        """
        batches = list(torch.split(order, self._recipe.batch_size))
        least = min(2 * self._group.size, self._recipe.batch_size)
        return batches if len(batches[-1]) >= least else batches[:-1]

    def _step_on(self, images: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Makes one step; returns sums over samples: data loss, correct, penalty, count."""
        self._set_rate()
        smoothing = self._recipe.label_smoothing
        with self._autocast:
            logits = self._forward(images)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        extra = penalty(self._net, self._recipe)
        self._update(weight * loss + extra)
        self._step += 1
        with torch.no_grad():
            data_loss = functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            count = torch.ones_like(data_loss) * len(labels)
            return torch.stack((data_loss, correct, extra * len(labels), count))

    @property
    def _done(self) -> float:
        """Share of all steps, 0 to 1."""
        return self._step / (self._recipe.epochs * self.steps_per_epoch)

    def _set_rate(self) -> None:
        recipe, done = self._recipe, self._done
        # Past the warm-up a plateau's rate belongs to the validation loss.
        if recipe.schedule == "plateau" and done >= recipe.warmup_share:
            return
        factor = rate_factor(recipe, done)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def _update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._recipe.clip_norm:
            nn.utils.clip_grad_norm_(self._net.parameters(), self._recipe.clip_norm)
        self._optimizer.step()
        if self._average:
            self._average.update()

    def _check_finite(self, *losses: float) -> None:
        if not all(math.isfinite(loss) for loss in losses):
            raise DivergedError(
                f"loss: expected a number, got {losses[0]} in epoch {self.epoch + 1}; "
                f"lower the learning rate (now {self._recipe.lr})"
            )


def _in_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recipe.precision == "bfloat16"


def _training_mode(net: nn.Module) -> None:
    """Training mode for all but frozen modules, whose statistics belong to their weights."""
    net.train()
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
