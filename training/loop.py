"""The training itself: epochs of steps, validation after each, the best weights kept.

Every epoch draws its random numbers from a seed of its own, so a run resumed after epoch n goes on
exactly as one that never stopped, and equal seeds give equal weights on a CPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from training.augment import augment
from training.errors import DivergedError, RecipeError
from training.evaluate import Evaluation, evaluate
from training.inputs import Normalization
from training.optim import make_average, make_optimizer, penalty
from training.recipe import Recipe
from training.schedules import rate_factor


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


class Trainer:
    """Trains one net on images held in memory.

    Args:
        net: On the device of the images.
        recipe: How.
        normalization: Of the pixels.
        train: Images `[N, H, W, 3]` uint8 and labels `[N]`.
        valid: Likewise; they drive the plateau schedule and choose the best epoch.

    Raises:
        RecipeError: A batch is larger than the training set.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        normalization: Normalization,
        train: tuple[Tensor, Tensor],
        valid: tuple[Tensor, Tensor],
    ) -> None:
        self._images, self._labels = train
        if recipe.batch_size > len(self._labels):
            raise RecipeError(
                f"batch_size: expected at most the {len(self._labels)} training images, "
                f"got {recipe.batch_size}"
            )
        self._net = net.to(memory_format=torch.channels_last)
        self._recipe = recipe
        self._normalization = normalization
        self._valid = valid
        self._optimizer = make_optimizer(net, recipe)
        self._plateau = ReduceLROnPlateau(self._optimizer)
        self._average = make_average(net, recipe)
        draws = torch.Generator().manual_seed(recipe.seed)
        self._coins = torch.randint(2, self._labels.shape, generator=draws)  # [N]
        self._step = 0
        self.epoch = 0

    @property
    def net(self) -> nn.Module:
        """What is evaluated and kept: the average where the recipe has one."""
        return self._average.net if self._average else self._net

    @property
    def images_per_epoch(self) -> int:
        """Size of the training set."""
        return len(self._labels)

    def steps_per_epoch(self) -> int:
        """Steps in an epoch; the last batch may be short."""
        return sum(1 for _ in self._split(torch.arange(len(self._labels))))

    def run_epoch(self, on_step: Callable[[], None]) -> EpochResult:
        """Trains on every batch once, then validates.

        Raises:
            DivergedError: The loss is NaN or infinite.
        """
        self._net.train()
        totals = torch.zeros(3, dtype=torch.float64)  # data loss, correct, penalty
        samples = 0
        for images, labels in self._batches():
            totals += len(labels) * self._step_on(images, labels)
            samples += len(labels)
            on_step()
        train_loss, train_accuracy, extra = (totals / samples).tolist()
        valid = self.evaluate(*self._valid)
        rate = self._optimizer.param_groups[0]["lr"]
        self._check_finite(train_loss, valid.loss)
        if self._recipe.schedule == "plateau":
            self._plateau.step(valid.loss)
        self.epoch += 1
        return EpochResult(
            self.epoch, train_loss, train_accuracy, valid.loss, valid.accuracy, extra, rate
        )

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """Scores the weights that would be kept on images `[N, H, W, 3]` uint8."""
        return evaluate(self.net, self._normalization.apply(images), labels)

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

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches: images `[N, 3, H, W]` float32 and labels `[N]`."""
        seed = self._recipe.seed * 1_000_003 + self.epoch
        torch.manual_seed(seed)  # dropout
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._labels), generator=draws)
        for indices in self._split(order):
            chosen = indices.to(self._images.device)
            images = self._normalization.apply(self._images[chosen])
            images = augment(images, self._coins[indices], self.epoch, self._recipe, draws)
            yield images.contiguous(memory_format=torch.channels_last), self._labels[chosen]

    def _split(self, order: Tensor) -> Iterator[Tensor]:
        """Batches of indices; a last one of a single image is left out, for batch norm's sake."""
        for indices in torch.split(order, self._recipe.batch_size):
            if len(indices) > 1 or self._recipe.batch_size == 1:
                yield indices

    def _step_on(self, images: Tensor, labels: Tensor) -> Tensor:
        """Makes one step; returns data loss, accuracy and penalty as float64 `[3]` on the CPU."""
        self._set_rate()
        logits = self._net(images)
        smoothing = self._recipe.label_smoothing
        loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        extra = penalty(self._net, self._recipe)
        self._update(loss + extra)
        self._step += 1
        with torch.no_grad():
            data_loss = functional.cross_entropy(logits, labels)
            accuracy = (logits.argmax(1) == labels).float().mean()
            return torch.stack((data_loss, accuracy, extra)).double().cpu()

    def _set_rate(self) -> None:
        recipe = self._recipe
        # Past the warm-up a plateau's rate belongs to the validation loss.
        done = self._step / (recipe.epochs * self.steps_per_epoch())
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
