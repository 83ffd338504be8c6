"""Images per second of one core, from JPEG files of 1.5 million pixels to a model's tensors.

    python -m benchmarks.decoding [models|decoders] --images 12 --rounds 5

Makes photographs of 1500 x 1000 px by enlarging parts of scikit-learn's two, adds noise as a camera
does, and saves them as JPEGs. Decodes them as the server does, with all pixels and scaled, in turn,
for models of several sizes, and prints the rates by processor time and how far the pixels differ.

`decoders` compares Pillow with those of simplejpeg, libvips and NVIDIA's DALI that are installed,
up to an image that Pillow can resize (`pip install simplejpeg pyvips-binary pyvips
nvidia-dali-cuda130`).
"""

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from convoy.server.images.decoding import decode_image
from convoy.server.models.manifest import Interpolation, Preprocessing
from convoy.server.requests import Images

# Side of the model's input and the shorter side before the crop.
MODELS = ((32, 0), (64, 72), (128, 146), (224, 256))
# The size of a decode at a quarter of the scale.
SCALED_PX = (375, 250)

Decode = Callable[[Sequence[bytes]], Iterable[Image.Image]]


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


def decoders(images: int) -> dict[str, Decode]:
    """Return the installed decoders by name; each gives images that Pillow can resize."""
    found: dict[str, Decode] = {
        "Pillow": partial(map, by_pillow),
        "Pillow, scaled": partial(map, partial(by_pillow, size_px=SCALED_PX)),
    }
    with contextlib.suppress(ImportError):
        from simplejpeg import decode_jpeg

        least = dict(zip(("min_width", "min_height"), SCALED_PX, strict=True))
        found["simplejpeg"] = partial(map, decoder_of(decode_jpeg))
        found["simplejpeg, scaled"] = partial(map, decoder_of(partial(decode_jpeg, **least)))
    with contextlib.suppress(ImportError):
        from pyvips import Image as Vips

        whole, scaled = (partial(Vips.jpegload_buffer, shrink=shrink) for shrink in (1, 4))
        found["libvips"] = partial(map, decoder_of(lambda file: whole(file).numpy()))
        found["libvips, scaled"] = partial(map, decoder_of(lambda file: scaled(file).numpy()))
    with contextlib.suppress(ImportError):
        found["DALI"] = by_dali(images)
    return found


def by_pillow(file: bytes, size_px: tuple[int, int] | None = None) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", size_px)
    image.load()
    return image


def decoder_of(to_pixels: Callable[[bytes], NDArray[np.uint8]]) -> Callable[[bytes], Image.Image]:
    return lambda file: Image.fromarray(to_pixels(file))


def by_dali(images: int) -> Decode:
    """Return DALI's decoder on the CPU, with one thread and all files in a batch."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(num_threads=1, device_id=None, exec_async=False, exec_pipelined=False)
    def decoding() -> object:
        files = fn.external_source(name="files", device="cpu")
        return fn.decoders.image(files, device="cpu", output_type=types.RGB)

    def run(files: Sequence[bytes]) -> Iterable[Image.Image]:
        pipeline.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        (decoded,) = pipeline.run()
        return [Image.fromarray(np.asarray(pixels)) for pixels in decoded]

    pipeline = decoding(batch_size=images)
    pipeline.build()
    return run


def measure_decoders(files: Sequence[bytes], rounds: int) -> None:
    """Print for each decoder its rate, its ratio to Pillow and how far its pixels differ."""
    rates: dict[str, list[float]] = {}
    pixels = {}
    found = decoders(len(files))
    for run in found.values():
        list(run(files))
    for _ in range(rounds):
        for name, run in found.items():
            # Of all threads: some decoders start their own.
            started_s = time.process_time()
            decoded = list(run(files))
            rates.setdefault(name, []).append(len(files) / (time.process_time() - started_s))
            pixels[name] = np.stack([np.asarray(image) for image in decoded])
    print("| decoder | images/s | of Pillow's | difference: mean, most |")
    print("|---|---|---|---|")
    for name, values in rates.items():
        like = "Pillow, scaled" if "scaled" in name else "Pillow"
        ratios = [new / old for old, new in zip(rates[like], values, strict=True)]
        apart = np.abs(pixels[like].astype(int) - pixels[name])
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        print(f"| {name} | {spread(values)} | {ratio} | {apart.mean():.2f}, {apart.max()} |")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} [{min(values):.0f}-{max(values):.0f}]"


def measure_models(files: Sequence[bytes], rounds: int) -> None:
    """Print the rates of the server's decoding, exact and scaled, for models of several sizes."""
    print(
        "| model, px | exact, images/s | scaled, images/s | ratio | difference: mean, p99, most |"
    )
    print("|---|---|---|---|---|")
    for side_px, shorter_px in MODELS:
        steps = [
            Preprocessing(side_px, side_px, shorter_px, Interpolation.BILINEAR, True, scaled)
            for scaled in (False, True)
        ]
        runs = [[decode(files, each) for each in steps] for _ in range(rounds)]
        exact, scaled = ([each[column][1] for each in runs] for column in range(2))
        ratios = [new / old for old, new in zip(exact, scaled, strict=True)]
        apart = np.abs(runs[0][0][0].astype(int) - runs[0][1][0])
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        differ = f"{apart.mean():.2f}, {np.percentile(apart, 99):.0f}, {apart.max()}"
        print(f"| {side_px} | {spread(exact)} | {spread(scaled)} | {ratio} | {differ} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["models", "decoders"], default="models")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    files = photographs(arguments.images)
    print(f"{statistics.mean(map(len, files)) / 1e3:.0f} kB a file")
    measure = {"models": measure_models, "decoders": measure_decoders}[arguments.what]
    measure(files, arguments.rounds)


if __name__ == "__main__":
    main()
