"""Images per second of one core, from JPEG files of 1.5 million pixels to a model's tensors.

    python -m benchmarks.decoding --images 12 --rounds 5

Makes photographs of 1500 x 1000 px by enlarging parts of scikit-learn's two, adds noise as a camera
does, and saves them as JPEGs. Decodes them as the server does, with all pixels and scaled, in turn,
for models of several sizes, and prints the rates by processor time and how far the pixels differ.
"""

import argparse
import io
import statistics
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation, Preprocessing
from convoy.server.requests import Images

# Side of the model's input and the shorter side before the crop.
MODELS = ((32, 0), (64, 72), (128, 146), (224, 256))


def photographs(count: int) -> list[bytes]:
    """Return JPEG files of 1500 x 1000 px."""
    random = np.random.default_rng(0)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for index in range(count):
        width, height = 480, 320
        left, top = random.integers(0, 640 - width), random.integers(0, 427 - height)
        part = sources[index % 2].crop((left, top, left + width, top + height))
        large = np.asarray(part.resize((1500, 1000), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(large + random.normal(0, 4, large.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=88)
        files.append(file.getvalue())
    return files


def decode(files: Sequence[bytes], steps: Preprocessing) -> tuple[Images, float]:
    """Return the tensors and the images per second of processor time."""
    started_s = time.thread_time()
    images = [decode_image(file, steps, max_pixels=50_000_000) for file in files]
    return np.concatenate(images), len(files) / (time.thread_time() - started_s)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} [{min(values):.0f}-{max(values):.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    files = photographs(arguments.images)
    print(f"{statistics.mean(map(len, files)) / 1e3:.0f} kB a file")
    print(
        "| model, px | exact, images/s | scaled, images/s | ratio | difference: mean, p99, most |"
    )
    print("|---|---|---|---|---|")
    for side_px, shorter_px in MODELS:
        steps = [
            Preprocessing(side_px, side_px, shorter_px, Interpolation.BILINEAR, True, scaled)
            for scaled in (False, True)
        ]
        rounds = [[decode(files, each) for each in steps] for _ in range(arguments.rounds)]
        exact, scaled = ([each[column][1] for each in rounds] for column in range(2))
        ratios = [new / old for old, new in zip(exact, scaled, strict=True)]
        apart = np.abs(rounds[0][0][0].astype(int) - rounds[0][1][0])
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        differ = f"{apart.mean():.2f}, {np.percentile(apart, 99):.0f}, {apart.max()}"
        print(f"| {side_px} | {spread(exact)} | {spread(scaled)} | {ratio} | {differ} |")


if __name__ == "__main__":
    main()
