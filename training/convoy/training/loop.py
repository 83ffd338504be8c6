"""The training loop: epochs of steps, with validation after each.

Every epoch has its own random seed, so a run resumed after epoch n gives the same weights as an
uninterrupted one, and equal seeds give bit-equal weights on a CPU.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from convoy.training.augment import cutout, draw, make_mixer, move, scale
from convoy.training.cpu_kernels import fastest_format, trains_in_bfloat16
from convoy.training.distributed import Group
from convoy.training.errors import DivergedError, RecipeError, StoppedError
from convoy.training.evaluate import Evaluation, predict
from convoy.training.normalization import Normalization
from convoy.training.optim import make_average, make_optimizer, penalty
from convoy.training.readers import Reader
from convoy.training.recipe import Recipe
from convoy.training.schedules import rate_factor, size_px

_log = logging.getLogger(__name__)

_EVALUATED_AT_ONCE = 500
# To agree on a stop, all processes wait for the device.
_AGREED_STEPS = 10


@dataclass(frozen=True, slots=True)
class EpochResult:
    """The results of an epoch; losses are means over samples, without the penalty."""

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
        recipe: The settings.
        normalization: Of the pixels.
        train: Training images.
        valid: Validation images, for the plateau schedule and the best epoch.
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
        device = train.labels.device
        self.precision = choose_precision(recipe, device, net)
        reduced = self.precision is torch.bfloat16
        self._format = fastest_format(net, recipe.image_size, device, bfloat16=reduced)
        self._net = net.to(memory_format=self._format)
        self._recipe = recipe
        self._normalization = normalization
        self._train, self._valid = train, valid
        self._group = group or Group()
        self._optimizer = make_optimizer(net, recipe)
        self._plateau = ReduceLROnPlateau(self._optimizer)
        self._average = make_average(net, recipe)
        wrapped = self._group.wrap(net)
        self._forward = torch.compile(wrapped) if recipe.compile else wrapped
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=reduced)
        draws = torch.Generator().manual_seed(recipe.seed)
        self._coins = torch.randint(2, (self._count,), generator=draws)  # [N]
        self.steps_per_epoch = len(self._split(torch.arange(self._count)))
        counts = torch.bincount(train.labels)
        # The mean over all images is 1.
        self._class_weights = self._count / (len(counts) * counts)
        self._mixer = make_mixer(recipe, len(counts))
        self._gathering = False
        self._step = 0
        self.epoch = 0
        # Of the current epoch: batches done, sums over them, and the state of random numbers.
        self._batch = 0
        self._totals = torch.zeros(4, dtype=torch.float64, device=device)
        self._random: dict[str, Tensor] = {}

    @property
    def net(self) -> nn.Module:
        """The evaluated weights: the average if the recipe has one."""
        return self._average.net if self._average else self._net

    def run_epoch(
        self, on_step: Callable[[], None], stop: Callable[[], bool] = lambda: False
    ) -> EpochResult:
        """Train on every batch once, then validate; continue an epoch that was stopped.

        Args:
            on_step: Called after each step.
            stop: Asked after each step, and between the batches of the validation.

        Raises:
            DivergedError: The loss is NaN or infinite.
            StoppedError: `stop` returned true; `state_dict` gives the state for the next call.
        """
        began = time.perf_counter()
        _training_mode(self._net)
        before = float(self._totals[-1])
        for images, labels, share in self._batches():
            self._totals += self._step_on(images, labels, share)
            self._batch += 1
            on_step()
            if self._is_stopped(stop):
                raise StoppedError("stopped")
        totals = self._totals.clone()
        self._group.add_up(totals)
        # The only synchronization with the device in an epoch.
        loss, correct, extra, samples = totals.tolist()
        images_per_s = (samples - before * self._group.size) / (time.perf_counter() - began)
        self._group.same_buffers(self.net)
        valid = self.evaluate(self._valid, stop if self._group.size == 1 else lambda: False)
        rate = self._optimizer.param_groups[0]["lr"]
        self._check_finite(loss, valid.loss)
        if self._recipe.schedule == "plateau":
            self._plateau.step(valid.loss)
        self.epoch += 1
        self._batch = 0
        self._totals.zero_()
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

    def evaluate(self, reader: Reader, stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Score the weights to be saved, in float32, on all images of a reader.

        Raises:
            StoppedError: `stop` returned true, asked before each batch.
        """
        total = len(reader.labels)
        mine = self._group.share(torch.arange(total))
        pixels = reader.read(torch.split(mine, _EVALUATED_AT_ONCE))
        batches = map(self._normalized, _until(stop, pixels))
        logits = self._group.gather(predict(self.net, batches), total)
        return Evaluation(logits, reader.labels.cpu())

    @property
    def steps_left(self) -> int:
        """The number of steps of the whole recipe."""
        return self._recipe.epochs * self.steps_per_epoch - self._step

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, which resumes exactly."""
        return {
            "epoch": self.epoch,
            "step": self._step,
            "net": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "plateau": self._plateau.state_dict(),
            "average": self._average.state_dict() if self._average else {},
            "batch": self._batch,
            "totals": self._totals,
            "random": _random_state(self._totals.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`.

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
            # Releases before this one stopped between epochs only.
            self._batch = state.get("batch", 0)
            self._totals += state["totals"].to(self._totals) if self._batch else 0.0
            self._random = state.get("random", {})
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"resume: the run was started with different settings: {reason}"
            ) from error

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield this process's share of each batch, augmented.

        Yields:
            Images `[N, 3, H, W]` float32, labels `[N]`, and the weight of their mean in the mean
            over all processes.
        """
        recipe, group = self._recipe, self._group
        seed = recipe.seed * 1_000_003 + self.epoch
        torch.manual_seed(seed + group.rank)  # dropout
        random = torch.Generator().manual_seed(seed)
        batches = self._split(self._order(random))
        mine = [group.share(batch) for batch in batches]
        done = self._batch
        # Repeats the draws of the completed batches, so that the others get the same as ever.
        for batch in batches[:done]:
            draw(recipe, self._coins[batch], self.epoch, random)
        read = self._train.read(mine[done:], self.epoch)
        for batch, indices, pixels in zip(batches[done:], mine[done:], read, strict=True):
            if self._random and done and self._batch == done:
                _set_random_state(self._random)
            draws = draw(recipe, self._coins[batch], self.epoch, random)
            draws = draws[group.rank :: group.size]
            size = size_px(recipe, self._done)
            images = self._normalized(scale(move(pixels, draws), size))
            if draws.centers is not None:
                shrunk = size / recipe.image_size
                centers = (draws.centers * shrunk).long()
                images = cutout(images, centers, round(recipe.cutout_px * shrunk))
            labels = self._train.labels[indices.to(images.device)]
            weight = len(indices) * group.size / len(batch)
            yield images, labels, weight

    def _normalized(self, pixels: Tensor) -> Tensor:
        """Map `[N, H, W, 3]` uint8 to `[N, 3, H, W]` float32, in the net's memory format."""
        return self._normalization.apply(pixels).contiguous(memory_format=self._format)

    def _order(self, random: torch.Generator) -> Tensor:
        """Return the indices of an epoch's images."""
        if self._recipe.balance != "sampling":
            return torch.randperm(self._count, generator=random)
        chances = self._class_weights[self._train.labels].cpu()
        return torch.multinomial(chances, self._count, replacement=True, generator=random)

    def _split(self, order: Tensor) -> list[Tensor]:
        """Yield batches of indices, without a last one of fewer than two images per process.

        Batch norm needs two images.
        """
        batches = list(torch.split(order, self._recipe.batch_size))
        least = min(2 * self._group.size, self._recipe.batch_size)
        return batches if len(batches[-1]) >= least else batches[:-1]

    def _step_on(self, images: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Run one step; return sums over samples: data loss, correct, penalty, count."""
        self._set_rate()
        mixed, targets = self._mixer(images, labels) if self._mixer else (images, labels)
        with self._autocast:
            logits = self._forward(mixed)
        logits = logits.float()
        loss = functional.cross_entropy(
            logits,
            targets,
            self._class_weights if self._recipe.balance == "weights" else None,
            label_smoothing=self._recipe.label_smoothing,
        )
        extra = penalty(self._net, self._recipe)
        self._update(weight * loss + extra)
        self._step += 1
        with torch.no_grad():
            data_loss = functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            count = torch.ones_like(data_loss) * len(labels)
            return torch.stack((data_loss, correct, extra * len(labels), count))

    def _is_stopped(self, stop: Callable[[], bool]) -> bool:
        """Ask after each step; several processes agree after some steps."""
        if self._gathering:
            # A checkpoint does not hold accumulated gradients.
            return False
        if self._group.size == 1:
            return stop()
        return self._step % _AGREED_STEPS == 0 and self._group.from_first(stop())

    @property
    def _done(self) -> float:
        """Share of all steps, 0 to 1."""
        return self._step / (self._recipe.epochs * self.steps_per_epoch)

    def _set_rate(self) -> None:
        recipe, done = self._recipe, self._done
        # After the warm-up, the validation loss determines a plateau's rate.
        if recipe.schedule == "plateau" and done >= recipe.warmup_share:
            return
        factor = rate_factor(recipe, done)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def _update(self, loss: Tensor) -> None:
        """Add up gradients, and make a step after every `accumulate` batches and the last one."""
        gathered = self._recipe.accumulate
        done = self._step % self.steps_per_epoch
        first = done - done % gathered
        # The last step of an epoch may be one of fewer batches.
        count = min(gathered, self.steps_per_epoch - first)
        if done == first:
            self._optimizer.zero_grad(set_to_none=True)
        (loss / count if count > 1 else loss).backward()  # type: ignore[no-untyped-call]
        self._gathering = done + 1 < first + count
        if self._gathering:
            return
        if self._recipe.clip_norm:
            nn.utils.clip_grad_norm_(self._net.parameters(), self._recipe.clip_norm)
        # Muon's matrix products gain as much as the net's.
        with self._autocast:
            self._optimizer.step()
        if self._average:
            self._average.update()

    def _check_finite(self, *losses: float) -> None:
        if not all(math.isfinite(loss) for loss in losses):
            raise DivergedError(
                f"loss: expected a number, got {losses[0]} in epoch {self.epoch + 1}; "
                f"lower the learning rate (now {self._recipe.lr})"
            )


def _until(stop: Callable[[], bool], batches: Iterator[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        if stop():
            raise StoppedError("stopped")
        yield batch


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def choose_precision(recipe: Recipe, device: torch.device, net: nn.Module) -> torch.dtype:
    """Return the type in which a training step computes products and convolutions.

    A CPU stays in float32, with a warning, where `trains_in_bfloat16` is false.

    Raises:
        RecipeError: The recipe names bfloat16, in which a CPU cannot train this net.
    """
    named = recipe.precision
    if device.type == "cuda":
        wanted = named == "bfloat16" or (named == "auto" and torch.cuda.is_bf16_supported())
    else:
        wanted = named == "bfloat16" or (named == "auto" and _has_amx())
        px = min(recipe.start_px, recipe.image_size) if recipe.growth_share else recipe.image_size
        if wanted and not trains_in_bfloat16(net, px):
            reason = (
                f"with images of {px} px {recipe.model} has maps that are smaller than a stride"
            )
            if named == "bfloat16":
                raise RecipeError(f"precision: expected float32 on a CPU, got bfloat16: {reason}")
            _log.warning("precision: float32 instead of bfloat16: %s", reason)
            wanted = False
    return torch.bfloat16 if wanted else torch.float32


def _has_amx() -> bool:
    """Tell whether the CPU is faster in bfloat16; older releases of torch do not tell."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16", False))


def _training_mode(net: nn.Module) -> None:
    """Set training mode, except for frozen modules, which keep their statistics."""
    net.train()
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
