"""The records of a run: metrics.jsonl for programs, trackers for people."""

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from convoy.training.checkpoints import Checkpoint
from convoy.training.errors import RecipeError
from convoy.training.loop import EpochResult
from convoy.training.normalization import Normalization
from convoy.training.report import (
    FinishedRun,
    draw_calibration,
    draw_confusion,
    draw_misclassified,
    feature_maps,
    first_filters,
    to_png,
    write_report,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run.

    Attributes:
        kept: Settings and final metrics.
        report: The content of the report.
        net: With the best weights.
        image: Pixels `[1, H, W, 3]` uint8 of a test image, for the graph and feature maps.
    """

    kept: Checkpoint
    report: FinishedRun
    net: nn.Module
    image: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """The final metrics by their tags."""
        return {f"final/{name}": value for name, value in self.kept.metrics.items()}


class Tracker(Protocol):
    """A service or folder that records the metrics and images of a run."""

    def start(self, settings: Mapping[str, object]) -> None:
        """Record the resolved recipe."""
        ...

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """Record an epoch's numbers."""
        ...

    def finish(self, outcome: Outcome, figures: Mapping[str, Figure], page: Path) -> None:
        """Record the final metrics, the pictures by their tags, and report.html."""
        ...

    def close(self) -> None:
        """Flush and close; called once, whether or not the run succeeded."""
        ...


class Journal:
    """Appends one line per epoch to metrics.jsonl, and reports to all trackers.

    Args:
        folder: Of the run.
        names: Of the trackers: tensorboard, mlflow, wandb.
        settings: The resolved recipe.
        keep_epochs: Lines of an earlier run to keep; later epochs run again.

    Raises:
        RecipeError: A tracker's package is missing, or the tracker cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings: Mapping[str, object],
        keep_epochs: int = 0,
    ) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] <= keep_epochs]
        self._path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        self._trackers: list[Tracker] = []
        self._stack = ExitStack()
        for name in dict.fromkeys(names):
            tracker = _make(name, folder, keep_epochs)
            self._stack.callback(tracker.close)
            self._trackers.append(tracker)
            tracker.start(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def write(self, result: EpochResult) -> None:
        """Record an epoch."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        scalars = {
            "Loss/train": result.train_loss,
            "Loss/valid": result.valid_loss,
            "Loss/penalty": result.penalty,
            "Accuracy/train": result.train_accuracy,
            "Accuracy/valid": result.valid_accuracy,
            "Learning rate": result.lr,
            "Images per second": result.images_per_s,
        }
        for tracker in self._trackers:
            tracker.write(scalars, result.epoch)

    def finish(self, outcome: Outcome) -> None:
        """Write report.png and report.html, and record the results of the run."""
        report = outcome.report
        figures = {
            "Report": write_report(self._folder, report),
            "Confusion matrix": draw_confusion(report.tested, report.classes),
            "Calibration": draw_calibration(report.tested, report.temperature),
        }
        if wrong := draw_misclassified(report):
            figures["Misclassified"] = wrong
        for tracker in self._trackers:
            tracker.finish(outcome, figures, self._folder / "report.html")


class TensorBoard:
    """Event files in the run's folder, with the net's graph, filters and feature maps."""

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_epochs + 1)
        self._settings: dict[str, int | float | str] = {}

    def start(self, settings: Mapping[str, object]) -> None:
        """See `Tracker`."""
        self._settings = {
            k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()
        }

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """See `Tracker`."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, epoch)

    def _draw_net(self, outcome: Outcome) -> None:
        data, net = outcome.kept.data, outcome.net
        normalized = Normalization(data.mean, data.std).apply(outcome.image)
        filters = first_filters(net)
        if filters is not None:
            self._writer.add_images("First layer/filters", filters)
            self._writer.add_images("First layer/feature maps", feature_maps(net, normalized))
        with warnings.catch_warnings():
            # TensorBoard's graph is a torch.jit trace, which is deprecated.
            warnings.filterwarnings("ignore", message="`torch.jit.*`")
            self._writer.add_graph(net.eval(), normalized)

    def finish(self, outcome: Outcome, figures: Mapping[str, Figure], page: Path) -> None:
        """See `Tracker`."""
        for tag, figure in figures.items():
            self._writer.add_figure(tag, figure, close=False)
        self._draw_net(outcome)
        self._writer.add_hparams(self._settings, outcome.metrics, run_name=".")

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Mlflow:
    """A run of MLflow, on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        import mlflow

        self._mlflow = mlflow
        self._run = mlflow.start_run(run_name=folder.name)

    def start(self, settings: Mapping[str, object]) -> None:
        """See `Tracker`."""
        self._mlflow.log_params(dict(settings))

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(dict(scalars), step=epoch)

    def finish(self, outcome: Outcome, figures: Mapping[str, Figure], page: Path) -> None:
        """See `Tracker`."""
        self._mlflow.log_metrics(outcome.metrics)
        for name, figure in figures.items():
            self._mlflow.log_figure(figure, f"{name.lower().replace(' ', '-')}.png")
        self._mlflow.log_artifact(str(page))

    def close(self) -> None:
        """See `Tracker`."""
        self._mlflow.end_run()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, folder: Path, keep_epochs: int = 0) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(name=folder.name, dir=str(folder), reinit="finish_previous")

    def start(self, settings: Mapping[str, object]) -> None:
        """See `Tracker`."""
        self._run.config.update(dict(settings))  # type: ignore[no-untyped-call]

    def write(self, scalars: Mapping[str, float], epoch: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=epoch)

    def finish(self, outcome: Outcome, figures: Mapping[str, Figure], page: Path) -> None:
        """See `Tracker`."""
        self._run.summary.update(outcome.metrics)
        # For a figure it would use matplotlib.pyplot, which depends on the display.
        pictures = {
            name: self._wandb.Image(Image.open(io.BytesIO(to_png(figure))))
            for name, figure in figures.items()
        }
        self._run.log({**pictures, "report": self._wandb.Html(page.read_text("utf-8"))})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}


def _make(name: str, folder: Path, keep_epochs: int) -> Tracker:
    try:
        return _TRACKERS[name](folder, keep_epochs)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"tracker {name}: needs {error.name}: pip install 'convoy-serving[{name}]'"
        ) from error
    # Both services raise errors of their own.
    except Exception as error:
        raise RecipeError(f"tracker {name}: {' '.join(str(error).split())}") from error
