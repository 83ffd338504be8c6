"""Data in tables, WebDataset tars and Hugging Face Parquet files, on this machine and by URL."""

import csv
import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from convoy.training.data import Dataset, ImageSet, load_data, open_data
from convoy.training.data.shards import list_shards
from convoy.training.errors import DataError
from tests.stores import gcs_server, s3_server

CLASSES = ("cat", "dog")


def encoded(seed: int, format_: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format_)
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, seeds: range, mode: str = "w", by_folder: bool = False) -> None:
    with tarfile.open(path, mode) as archive:
        for seed in seeds:
            name = CLASSES[seed % 2]
            stem = f"{name}/{seed:04}" if by_folder else f"{seed:04}"
            add(archive, f"{stem}.png", encoded(seed))
            if not by_folder:
                add(archive, f"{stem}.cls", name.encode())


def write_parquet(path: Path, seeds: range) -> None:
    """As `datasets` writes it: a struct of bytes and path, and the classes in the metadata."""
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": [{"bytes": encoded(seed), "path": f"{seed}.png"} for seed in seeds],
            "label": [seed % 2 for seed in seeds],
        }
    )
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(about), path, row_group_size=4)


def check(data: Dataset[ImageSet], train: int, test: int) -> None:
    assert data.classes == CLASSES
    assert (len(data.train) + len(data.valid), len(data.test)) == (train, test)
    images = [Image.open(io.BytesIO(encoded(seed))) for seed in range(44)]
    expected = {
        image.resize((32, 32), Image.Resampling.BILINEAR).tobytes(): seed
        for seed, image in enumerate(images)
    }
    for part in (data.train, data.valid, data.test):
        for pixels, label in zip(part.images, part.labels, strict=True):
            assert expected[pixels.tobytes()] % 2 == label


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Tars of training and test images, in two shards the former."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "train-000.tar", range(12))
    write_tar(folder / "train-001.tar", range(12, 20))
    write_tar(folder / "test-000.tar", range(20, 26))
    return folder


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{train-{000..001},test-000}.tar"])
def test_tars_of_webdataset(pattern: str, shards: Path, tmp_path: Path) -> None:
    if "{train-{" in pattern:
        pattern = "/{train-000,train-001,test-000}.tar"
    spec = f"shards:{shards}{pattern}"
    check(load_data(spec, cache=tmp_path / "cache"), 20, 6)


def test_braces_stand_for_shards_that_need_not_be_listed(shards: Path) -> None:
    found = list_shards(f"{shards}/train-{{000..001}}.tar")
    assert [Path(each.url).name for each in found] == ["train-000.tar", "train-001.tar"]
    with pytest.raises(DataError, match=r"expected .tar, .*, found none"):
        list_shards(f"{shards}/train-{{005..007}}.tar")


def test_a_tar_is_read_where_it_lies_and_in_any_order(shards: Path, tmp_path: Path) -> None:
    from convoy.training.data import Preprocessing

    streamed = open_data(f"shards:{shards}", Preprocessing(), stream=True, cache=tmp_path / "cache")
    loaded = load_data(f"shards:{shards}", cache=tmp_path / "cache")
    order = [7, 0, 3]
    np.testing.assert_array_equal(streamed.train.read(order), loaded.train.images[order])
    assert not list((tmp_path / "cache").glob("*.pack"))


@pytest.mark.parametrize(("suffix", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar", "w")])
def test_classes_by_folder_in_a_tar(suffix: str, mode: str, tmp_path: Path) -> None:
    write_tar(tmp_path / f"photos.{suffix}", range(40), mode, by_folder=True)
    spec = f"shards:{tmp_path}/photos.{suffix}"
    data = load_data(spec, cache=tmp_path / "cache")
    check(data, 36, 4)
    assert bool(list((tmp_path / "cache").glob("*.pack"))) == (suffix != "tar")


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", range(12))
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(12, 20))
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", range(20, 24))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", range(24, 30))
    cache = tmp_path / "cache"
    data = load_data(f"shards:{tmp_path}/*.parquet", cache=cache)
    check(data, 24, 6)
    assert len(data.valid) == 4
    packs = {path: path.stat().st_mtime_ns for path in cache.glob("*.pack")}
    assert len(packs) == 4
    check(load_data(f"shards:{tmp_path}/*.parquet", cache=cache), 24, 6)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.pack")} == packs
    # A pack that is gone or cut is made anew.
    first, second, *_ = packs
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    for entry in cache.glob("*.npz"):
        if b"images" in entry.read_bytes()[:200]:
            entry.unlink()
    check(load_data(f"shards:{tmp_path}/*.parquet", cache=cache), 24, 6)


@pytest.fixture
def web(shards: Path) -> Iterator[str]:
    """The folder of shards by HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_shards_by_http(web: str, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    spec = f"shards:{web}/{{train-000,train-001,test-000}}.tar"
    check(load_data(spec, cache=tmp_path / "cache"), 20, 6)
    with pytest.raises(DataError, match=r"absent\.tar"):
        load_data(f"shards:{web}/absent.tar", cache=tmp_path / "cache")


def test_shards_of_any_file_system_that_fsspec_opens(shards: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/photos/{path.name}", path.read_bytes())
    for pattern in ("memory://photos", "memory://photos/*.tar"):
        check(load_data(f"shards:{pattern}", cache=tmp_path / "cache"), 20, 6)


@pytest.mark.parametrize(("scheme", "server"), [("s3", s3_server), ("gs", gcs_server)])
def test_shards_in_a_bucket(shards: Path, tmp_path: Path, scheme: str, server) -> None:
    with server() as store:
        for path in shards.iterdir():
            store.files.pipe(f"bucket/photos/{path.name}", path.read_bytes())
        for pattern in (f"{scheme}://bucket/photos", f"{scheme}://bucket/photos/*.tar"):
            check(load_data(f"shards:{pattern}", cache=tmp_path / "cache"), 20, 6)
        with pytest.raises(DataError, match=r"absent"):
            load_data(f"shards:{scheme}://bucket/absent/*.tar", cache=tmp_path / "cache")


def test_cached_shards_of_a_store_that_is_away_are_one_line(shards: Path, tmp_path: Path) -> None:
    """gcsfs would try for half a minute to reach its store."""
    with s3_server() as store:
        for path in shards.iterdir():
            store.files.pipe(f"bucket/photos/{path.name}", path.read_bytes())
        load_data("shards:s3://bucket/photos", cache=tmp_path / "cache")
        store.stop()
        # What the cache holds is checked against the store.
        with pytest.raises(DataError, match="s3://bucket/photos"):
            load_data("shards:s3://bucket/photos", cache=tmp_path / "cache")


def test_what_a_tar_lacks_is_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bare.tar", "w") as archive:
        add(archive, "0001.png", encoded(1))
    with pytest.raises(DataError, match=r"bare.tar: 0001.png: expected a label"):
        load_data(f"shards:{tmp_path}/bare.tar", cache=tmp_path / "cache")
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"broken\.tar"):
        load_data(f"shards:{tmp_path}/broken.tar", cache=tmp_path / "cache")
    pq.write_table(pa.table({"label": [0, 1]}), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match=r"expected a column of images .* found label"):
        load_data(f"shards:{tmp_path}/bare.parquet", cache=tmp_path / "cache")


def test_a_shard_is_not_unpacked_beyond_the_limit_of_the_cache(tmp_path: Path) -> None:
    from convoy.training.data import Cache

    write_parquet(tmp_path / "photos.parquet", range(12))
    with pytest.raises(DataError, match="expected room in the cache"):
        load_data(f"shards:{tmp_path}/photos.parquet", cache=Cache(tmp_path / "cache", 1000))
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, object]]:
    """Images in one folder, and what a table says of them."""
    (tmp_path / "images").mkdir()
    made = []
    for seed in range(26):
        (tmp_path / "images" / f"{seed}.png").write_bytes(encoded(seed))
        split = "train" if seed < 20 else "test"
        made.append({"path": f"images/{seed}.png", "label": CLASSES[seed % 2], "split": split})
    return made


@pytest.mark.parametrize("with_split", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_paths_and_labels(
    suffix: str, with_split: bool, rows: list[dict[str, object]], tmp_path: Path
) -> None:
    path = tmp_path / f"photos.{suffix}"
    chosen = rows if with_split else [{k: v for k, v in r.items() if k != "split"} for r in rows]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(chosen), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(chosen[0]))
            writer.writeheader()
            writer.writerows(chosen)
    data = load_data(f"table:{path}", cache=tmp_path / "cache")
    check(data, 20, 6) if with_split else check(data, 24, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a line of column names and rows"),
        ("picture,label\na.png,cat\n", "expected a column path or .*, found picture, label"),
        ("path,label\na.png\n", "row 2: expected 2 fields, got 1"),
        ("path,label\na.png,\n", "row 2: expected a path and a label"),
        ("path,label,split\na.png,cat,holdout\n", "row 2: split: expected train, valid or test"),
        ("path,label\na.png,cat\nb.png,dog\n", "2 unreadable images .*No such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "photos.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(f"table:{tmp_path}/photos.csv", cache=tmp_path / "cache")


def test_numbers_as_classes_come_in_their_order(tmp_path: Path) -> None:
    lines = ["path,label"]
    for seed in range(44):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
        lines.append(f"{seed}.png,{seed % 11}")
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    data = load_data(f"table:{tmp_path}/photos.csv", cache=tmp_path / "cache")
    assert data.classes == tuple(str(number) for number in range(11))
