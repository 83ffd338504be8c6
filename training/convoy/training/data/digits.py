"""scikit-learn's 1,797 real handwritten digits, which need no download.

Source: Alpaydin and Kaynak (1998), "Optical Recognition of Handwritten Digits", UCI.
"""

import numpy as np
from PIL import Image

from convoy.training.data.images import Preprocessing, preprocess
from convoy.training.data.imageset import Dataset, ImageSet, stratified_split

_SPLIT_SEED = 0
_HELD_OUT_SHARE = 1 / 6


def load_digits(steps: Preprocessing) -> Dataset[ImageSet]:
    """Return the digits 0 to 9: about 1,250 to train on, 250 to validate, 300 to test.

    The 8 x 8 values 0..16 become 0..255, gray becomes RGB, and Pillow resizes them by `steps`.
    The split is stratified and always the same.
    """
    from sklearn import datasets

    values, labels = datasets.load_digits(return_X_y=True)
    gray = np.round(values.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)  # [N, 8, 8]
    images = np.stack([preprocess(Image.fromarray(digit), steps) for digit in gray])
    everything = ImageSet(images, labels.astype(np.int64))
    rest, test = stratified_split(everything.labels, _HELD_OUT_SHARE, _SPLIT_SEED)
    train, valid = stratified_split(everything.labels[rest], _HELD_OUT_SHARE, _SPLIT_SEED)
    return Dataset(
        train=everything.take(rest[train]),
        valid=everything.take(rest[valid]),
        test=everything.take(test),
        classes=tuple(str(digit) for digit in range(10)),
    )
