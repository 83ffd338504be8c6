import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from training import nets
from training.evaluate import Evaluation
from training.report import confusion_matrix, feature_maps, first_filters, misclassified


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
