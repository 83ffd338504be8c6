import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from convoy.training.errors import NetError
from convoy.training.filters import KERNELS, apply_filter

EXAMPLE = torch.zeros(6, 6)
EXAMPLE[1, 1:5] = 255
EXAMPLE[2, 4] = EXAMPLE[3, 3] = EXAMPLE[4, 2] = 255


@pytest.mark.parametrize(
    ("name", "ninths"),
    [
        # The slide's third value is 255/3; the window also covers (2, 4), so it is 1020/9.
        (
            "mean",
            [
                [510, 765, 1020, 765],
                [510, 1020, 1275, 1020],
                [255, 510, 765, 510],
                [255, 510, 510, 255],
            ],
        ),
        (
            "vertical",
            [[765, 765, 765, 1530], [765, 765, 1530, 1530], [0, 765, 765, 765], [0, 765, 765, 0]],
        ),
        (
            "sharpen",
            [
                [3315, 3315, 3060, 3315],
                [-255, -765, -510, 2805],
                [-255, 0, 2805, 0],
                [0, 3060, 0, -255],
            ],
        ),
    ],
)
def test_the_slides_example_gives_its_exact_tables(name: str, ninths: list[list[int]]) -> None:
    answer = apply_filter(name, EXAMPLE, padded=False)
    torch.testing.assert_close(answer, torch.tensor(ninths) / 9, atol=1e-4, rtol=1e-6)


def test_padding_adds_zeros_outside() -> None:
    answer = 9 * apply_filter("mean", EXAMPLE)
    assert answer[0].round().tolist() == [255, 510, 765, 765, 510, 255]
    assert answer[2].round().tolist() == [255, 510, 1020, 1275, 1020, 510]
    assert answer[5].round().tolist() == [0, 255, 255, 255, 0, 0]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gray", [True, False])
def test_filters_equal_opencv_on_real_photographs(name: str, gray: bool) -> None:
    kernel = np.array(KERNELS[name])
    for photo in load_sample_images().images:
        image = photo[100:164, 200:280]
        image = image[..., 1] if gray else image
        expected = cv2.filter2D(
            image.astype(np.float32), -1, kernel, borderType=cv2.BORDER_CONSTANT
        )
        answer = apply_filter(name, torch.from_numpy(image.copy()))
        np.testing.assert_allclose(answer.numpy(), expected, atol=1e-3)
        valid = apply_filter(name, torch.from_numpy(image.copy()), padded=False)
        np.testing.assert_allclose(valid.numpy(), expected[1:-1, 1:-1], atol=1e-3)


def test_the_lectures_opencv_call_differs_as_the_docstring_says() -> None:
    picture = EXAMPLE.numpy().astype(np.uint8)
    corner = cv2.filter2D(picture, -1, np.array(KERNELS["mean"]))[0, 0]
    assert corner == 113  # reflect-101; the convolution sees 255 / 9
    saturated = cv2.filter2D(picture, -1, np.array(KERNELS["sharpen"]))
    assert np.array_equal(saturated, picture)
    assert apply_filter("sharpen", EXAMPLE).max() > 255


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(NetError, match=r"expected one of mean.*got 'blur'"):
        apply_filter("blur", EXAMPLE)
