import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from convoy.training import nets
from convoy.training.evaluate import Evaluation
from convoy.training.report import (
    FinishedRun,
    calibration,
    class_accuracy,
    confused_pairs,
    confusion_matrix,
    draw_misclassified,
    feature_maps,
    first_filters,
    misclassified,
    write_report,
)


def make_evaluation() -> Evaluation:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 5, generator=draws)
    return Evaluation(logits, torch.randint(4, (200,), generator=draws))


def test_the_confusion_matrix_is_torchmetrics() -> None:
    tested = make_evaluation()
    expected = multiclass_confusion_matrix(tested.logits, tested.labels, num_classes=5)
    assert torch.equal(confusion_matrix(tested, 5), expected)


def test_misclassified_images_come_most_confident_first() -> None:
    tested = make_evaluation()
    shown = misclassified(tested)
    assert len(shown) == 25
    assert (tested.logits.argmax(1)[shown] != tested.labels[shown]).all()
    confidence = torch.softmax(tested.logits, 1).amax(1)
    assert confidence[shown].tolist() == sorted(confidence[shown].tolist(), reverse=True)
    wrong = tested.logits.argmax(1) != tested.labels
    assert confidence[shown[0]] == confidence[wrong].max()


def test_filters_and_feature_maps_are_scaled_for_show() -> None:
    net = nets.create("net")
    filters = first_filters(net)
    assert filters is not None
    assert filters.shape == (16, 3, 3, 3)
    maps = feature_maps(net, torch.randn(1, 3, 32, 32))
    assert maps.shape == (16, 1, 32, 32)
    for shown in (filters, maps):
        assert torch.all(shown.amin((1, 2, 3)) == 0)
        torch.testing.assert_close(shown.amax((1, 2, 3)), torch.ones(16))


def test_the_accuracy_of_each_class_is_torchmetrics() -> None:
    tested = make_evaluation()
    expected = multiclass_accuracy(tested.logits, tested.labels, num_classes=5, average="none")
    found = class_accuracy(confusion_matrix(tested, 5))
    torch.testing.assert_close(found[:4], expected[:4])
    assert found[4].isnan()  # no image is of this class


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_calibration_error_is_torchmetrics(temperature: float) -> None:
    tested = make_evaluation()
    probabilities = torch.softmax(tested.logits.double() / temperature, 1)
    expected = multiclass_calibration_error(probabilities, tested.labels, num_classes=5, n_bins=10)
    found = calibration(tested, temperature)
    assert found.error == pytest.approx(float(expected), abs=1e-6)
    assert found.counts.sum() == len(tested.labels)


def test_the_most_confused_pairs_come_first_also_of_many_classes() -> None:
    counts = torch.zeros(100, 100, dtype=torch.int64)
    counts.fill_diagonal_(50)
    counts[97, 3], counts[3, 97], counts[11, 12] = 9, 4, 7
    assert confused_pairs(counts) == [(97, 3, 9), (11, 12, 7), (3, 97, 4)]
    assert counts[0, 0] == 50


def make_finished(classes: int) -> FinishedRun:
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(300, classes, generator=draws)
    tested = Evaluation(logits, torch.randint(classes, (300,), generator=draws))
    wrong = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), np.uint8)
    names = [f"<class {index}>" for index in range(classes)]
    lines = ["files: 3 JPEG & more"]
    return FinishedRun("net on a < b", names, tested, 1.5, 2, {"lr": 0.1}, lines, wrong)


@pytest.mark.parametrize("classes", [4, 100])
def test_the_page_is_one_file_with_everything(classes: int, tmp_path: Path) -> None:
    epoch = {"train_loss": 1.0, "valid_loss": 1.5, "train_accuracy": 0.5, "valid_accuracy": 0.4}
    lines = [json.dumps({"epoch": number, **epoch}) for number in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    finished = make_finished(classes)
    figure = write_report(tmp_path, finished)
    assert figure.get_suptitle() == "net on a < b"
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["train", "valid", "kept: epoch 2"]
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', page)
    assert page.count("data:image/png") == 2 + 25
    assert page.count("<tr><td>&lt;class ") == classes + min(20, classes * (classes - 1))
    assert "net on a &lt; b" in page
    assert "3 JPEG &amp; more" in page
    wrong = misclassified(finished.tested)[0]
    truth, answer = finished.tested.labels[wrong], finished.tested.logits[wrong].argmax()
    assert f"&lt;class {truth}&gt; → &lt;class {answer}&gt;, " in page


def test_misclassified_images_are_drawn_with_both_classes() -> None:
    figure = draw_misclassified(make_finished(4))
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 25
    assert all(re.fullmatch(r"<class \d> → <class \d>, \d+%", title) for title in titles)
