"""What a run writes down: metrics.jsonl for programs, TensorBoard events for people."""

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from training.loop import EpochResult
from training.report import feature_maps, first_filters


class Tracker:
    """Appends one line an epoch to metrics.jsonl and the same numbers to TensorBoard.

    Args:
        folder: Of the run.
        keep_epochs: Lines of an earlier run to keep; those after it are about to be made again.
    """

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        self._path = folder / "metrics.jsonl"
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] <= keep_epochs]
        self._path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_epochs + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def write(self, result: EpochResult, images_per_s: float) -> None:
        """Records an epoch."""
        record = {**asdict(result), "images_per_s": round(images_per_s, 1)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        tags = {
            "Loss/train": result.train_loss,
            "Loss/valid": result.valid_loss,
            "Loss/penalty": result.penalty,
            "Accuracy/train": result.train_accuracy,
            "Accuracy/valid": result.valid_accuracy,
            "Learning rate": result.lr,
            "Images per second": images_per_s,
        }
        for tag, value in tags.items():
            self._writer.add_scalar(tag, value, result.epoch)

    def draw(self, report: Figure, net: nn.Module, inputs: Tensor, wrong: Tensor) -> None:
        """Shows the report, the first filters, their feature maps, and wrongly classified images.

        Args:
            report: Curves and confusion matrix.
            net: In the state that is kept.
            inputs: Normalised test images `[N, 3, H, W]`; the first gives the feature maps.
            wrong: Pixels of misclassified images `[M, H, W, 3]` uint8.
        """
        self._writer.add_figure("Report", report, close=False)
        if len(wrong):
            self._writer.add_images("Misclassified", wrong, dataformats="NHWC")
        filters = first_filters(net)
        if filters is not None:
            self._writer.add_images("First layer/filters", filters)
            maps = feature_maps(net, inputs[:1])
            self._writer.add_images("First layer/feature maps", maps)

    def finish(self, settings: dict[str, Any], metrics: dict[str, float]) -> None:
        """Records the run's settings beside what came of them."""
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        final = {f"final/{name}": value for name, value in metrics.items()}
        self._writer.add_hparams(plain, final, run_name=".")
