"""What a run writes down: metrics.jsonl for programs, TensorBoard events for people."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from training.checkpoints import Checkpoint
from training.evaluate import Evaluation
from training.inputs import Normalization
from training.loop import EpochResult
from training.report import draw_confusion, feature_maps, first_filters, write_report


class Tracker:
    """Appends one line an epoch to metrics.jsonl and the same numbers to TensorBoard.

    Args:
        folder: Of the run.
        keep_epochs: Lines of an earlier run to keep; those after it are about to be made again.
    """

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        self._folder = folder
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

    def write(self, result: EpochResult) -> None:
        """Records an epoch."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        tags = {
            "Loss/train": result.train_loss,
            "Loss/valid": result.valid_loss,
            "Loss/penalty": result.penalty,
            "Accuracy/train": result.train_accuracy,
            "Accuracy/valid": result.valid_accuracy,
            "Learning rate": result.lr,
            "Images per second": result.images_per_s,
        }
        for tag, value in tags.items():
            self._writer.add_scalar(tag, value, result.epoch)

    def finish(
        self, kept: Checkpoint, tested: Evaluation, net: nn.Module, image: Tensor, wrong: Tensor
    ) -> None:
        """Draws report.png and shows what came of the run.

        Args:
            kept: Settings and final metrics.
            tested: On the test images.
            net: With the weights that are kept.
            image: Pixels `[1, H, W, 3]` uint8 of a test image, for the graph and feature maps.
            wrong: Pixels of misclassified test images `[M, H, W, 3]` uint8.
        """
        classes = kept.data.classes
        self._writer.add_figure("Report", write_report(self._folder, classes, tested))
        self._writer.add_figure("Confusion matrix", draw_confusion(tested, classes))
        if len(wrong):
            self._writer.add_images("Misclassified", wrong.cpu(), dataformats="NHWC")
        normalized = Normalization(kept.data.mean, kept.data.std).apply(image)
        filters = first_filters(net)
        if filters is not None:
            self._writer.add_images("First layer/filters", filters)
            self._writer.add_images("First layer/feature maps", feature_maps(net, normalized))
        self._add_graph(net, normalized)
        self._add_settings(kept)

    def _add_graph(self, net: nn.Module, image: Tensor) -> None:
        with warnings.catch_warnings():
            # TensorBoard's graph is a torch.jit trace, which is deprecated.
            warnings.filterwarnings("ignore", message="`torch.jit.*`")
            self._writer.add_graph(net.eval(), image)

    def _add_settings(self, kept: Checkpoint) -> None:
        settings = {
            k: v if isinstance(v, int | float | str) else str(v) for k, v in kept.recipe.items()
        }
        final = {f"final/{name}": value for name, value in kept.metrics.items()}
        self._writer.add_hparams(settings, final, run_name=".")
