"""MLflow and Weights & Biases by their own packages, offline."""

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from convoy.training.tracking import _make


class Outcome:
    """What a tracker reads of a finished run."""

    metrics = {"final/test_accuracy": 0.5}  # noqa: RUF012


# Weights & Biases starts a process of its own.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_keeps_numbers_pictures_and_the_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    figure = Figure()
    FigureCanvasAgg(figure)
    figure.subplots().plot([1, 2])
    page = tmp_path / "report.html"
    page.write_text("<p>report</p>")
    tracker = _make(name, tmp_path, 0)
    tracker.start({"lr": 0.1, "model_arguments": {"width": 4}})
    tracker.write({"Loss/train": 1.0}, 1)
    tracker.finish(Outcome(), {"Confusion matrix": figure}, page)  # type: ignore[arg-type]
    tracker.close()
    kept = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    if name == "mlflow":
        assert {"train", "test_accuracy", "lr", "confusion-matrix.png"} <= kept
    else:
        assert any(each.startswith("Confusion matrix_") for each in kept), kept
