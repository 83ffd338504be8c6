"""What `convoy-client batch` reads: each kind of input, from any number on, in shares."""

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.batch import Input, InputError, Shard, listing
from tests.clients.batches import read_items

COUNT = 23
FILES = [f"file {number}".encode() for number in range(COUNT)]


def keys(name: object, folder: Path, **options: object) -> list[str]:
    return [item.key for item in read_items(Input(str(name), **options), folder)]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where a job keeps its list."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, content in enumerate(FILES):
        path = folder / f"{number % 4}" / f"{number:02}.{('JPG', 'png')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "notes.txt").write_text("no image")
    return folder


def tar(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for number, content in enumerate(FILES):
            for suffix, data in ((".jpg", content), (".cls", b"3")):
                member = tarfile.TarInfo(f"train/{number:04}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def parquet(path: Path, image: pa.Array, **columns: list) -> Path:
    table = pa.table({"image": image, **columns})
    pq.write_table(table, path, row_group_size=5)
    return path


@pytest.fixture(params=["folder", "list", "tar", "tar.gz", "parquet", "npy"])
def any_input(request, tmp_path: Path, folder: Path) -> Path:
    match request.param:
        case "folder":
            return folder
        case "list":
            path = tmp_path / "list.txt"
            path.write_text("".join(f"{image}\n\n" for image in sorted(folder.glob("?/*"))))
            return path
        case "tar":
            return tar(tmp_path / "images.tar", "w")
        case "tar.gz":
            return tar(tmp_path / "images.tar.gz", "w:gz")
        case "parquet":
            return parquet(tmp_path / "images.parquet", pa.array(FILES, pa.binary()))
    path = tmp_path / "images.npy"
    np.save(path, np.arange(COUNT * 4 * 5 * 3, dtype=np.uint8).reshape(COUNT, 4, 5, 3))
    return path


def test_any_input_starts_at_any_number(any_input, work):
    source = Input(str(any_input)).open(work)
    whole = list(source.items(0))
    assert len(whole) == COUNT == (source.total or COUNT)
    assert len({item.key for item in whole}) == COUNT
    for start in range(COUNT + 1):
        rest = list(source.items(start))
        assert [item.key for item in rest] == [item.key for item in whole[start:]]
        for one, other in zip(rest, whole[start:], strict=True):
            assert np.array_equal(one.image, other.image)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_shards_are_disjoint_and_complete(any_input, tmp_path, count):
    whole, shares = [], []
    for index in range(count):
        work = tmp_path / f"work{index}"
        work.mkdir()
        source = Input(str(any_input), Shard(index, count)).open(work)
        share = [item.key for item in source.items(0)]
        assert source.total in (None, len(share))
        shares.append(share)
    (tmp_path / "whole").mkdir()
    whole = keys(any_input, tmp_path / "whole")
    assert sorted(key for share in shares for key in share) == sorted(whole)
    assert count != 2 or all(shares)


def test_a_shard_is_written_i_of_n():
    assert Shard.parse("3/16").name(Path("a/out.csv")) == Path("a/out-00003-of-00016.csv")
    assert Shard.parse("0/1").name(Path("out.csv")) == Path("out.csv")
    for text in ("4/4", "-1/4", "1", "a/b", "1/0", ""):
        with pytest.raises(InputError, match="--shard: expected I/N"):
            Shard.parse(text)


def test_a_folder_is_read_to_its_depth_in_order(folder, work):
    names = keys(folder, work)
    assert names == sorted(names)
    assert names[0] == "0/00.JPG"
    first = read_items(Input(str(folder)), work)[0]
    assert Path(first.image).read_bytes() == FILES[0]


def test_names_are_sorted_on_disk_where_they_are_many(folder, work, monkeypatch):
    expected = keys(folder, work)
    (work / "inputs").unlink()
    monkeypatch.setattr(listing, "_NAMES_IN_MEMORY", 4)
    assert keys(folder, work) == expected
    assert {path.name for path in work.iterdir()} == {"inputs"}


def test_a_list_of_files_stays_as_it_was_when_the_job_began(folder, work):
    before = keys(folder, work)
    (folder / "0" / "000.png").write_bytes(b"newer")
    (folder / "1" / "01.png").unlink()
    assert keys(folder, work) == before


def test_a_name_that_is_no_utf8_becomes_text(tmp_path, work):
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    path = os.path.join(folder, b"caf\xe9\n.png")
    with open(path, "wb") as file:
        file.write(b"content")
    (item,) = read_items(Input(str(tmp_path / "images")), work)
    assert item.key == "caf\\xe9\n.png"
    assert os.fsencode(item.image) == path


def test_a_glob_crosses_folders(folder, work):
    assert len(keys(folder / "**" / "*.png", work)) == COUNT // 2
    (work / "inputs").unlink()
    assert keys(folder / "[01]" / "0?.*", work)[0] == str(folder / "0" / "00.JPG")


def test_a_list_keeps_its_order(tmp_path, work):
    listed = tmp_path / "some.list"
    listed.write_text("b.png\r\n\na/ä.jpg\nmissing\nb.png\n")
    assert keys(listed, work) == ["b.png", "a/ä.jpg", "missing", "b.png"]


def test_a_tar_gives_its_images_alone(tmp_path, work):
    items = read_items(Input(str(tar(tmp_path / "x.tar", "w"))), work)
    assert [item.key for item in items] == [f"train/{n:04}.jpg" for n in range(COUNT)]
    assert [item.image for item in items] == FILES


@pytest.mark.parametrize("name", ["cut.tar", "cut.tar.gz"])
def test_a_damaged_tar_is_an_error(tmp_path, work, name):
    path = tar(tmp_path / name, "w:gz" if name.endswith("gz") else "w")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 17])
    with pytest.raises(InputError, match=r"after \d+ images"):
        keys(path, work)


def test_a_tar_is_not_remembered(tmp_path, work):
    path = tmp_path / "many.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(20_000):
            archive.addfile(tarfile.TarInfo(f"{number}.png"))
            archive.members.clear()
    tracemalloc.start()
    assert sum(1 for _ in Input(str(path)).open(work).items(0)) == 20_000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_a_parquet_column_of_hugging_face(tmp_path, work):
    images = [{"bytes": content, "path": None} for content in FILES]
    path = parquet(tmp_path / "x.parquet", pa.array(images), name=[f"n{n}" for n in range(COUNT)])
    items = read_items(Input(str(path), key_column="name"), work)
    assert [item.key for item in items] == [f"n{n}" for n in range(COUNT)]
    assert [item.image for item in items] == FILES


def test_a_parquet_row_without_an_image_is_an_empty_one(tmp_path, work):
    path = parquet(tmp_path / "x.parquet", pa.array([b"a", None], pa.binary()))
    assert [item.image for item in read_items(Input(str(path)), work)] == [b"a", b""]


def test_a_parquet_column_is_named_where_it_is_not_clear(tmp_path, work):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"left": [b"l"], "right": [b"r"], "number": [1]}), path)
    assert [i.image for i in read_items(Input(str(path), image_column="right"), work)] == [b"r"]
    for options, message in (
        ({}, r"--image-column .*left, right"),
        ({"image_column": "number"}, "got 'number'"),
        ({"image_column": "left", "key_column": "x"}, "--key-column: .*number"),
    ):
        with pytest.raises(InputError, match=message):
            keys(path, work, **options)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4, 3), np.float32),
        np.zeros((2, 3, 4), np.uint8),
        np.asfortranarray(np.zeros((2, 3, 4, 3), np.uint8)),
        np.array([{}], object),
    ],
)
def test_an_array_of_another_kind_is_refused(tmp_path, work, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=r"x\.npy: "):
        keys(tmp_path / "x.npy", work)


def test_an_array_is_read_in_pieces(tmp_path, work):
    images = np.random.default_rng(0).integers(0, 256, (90, 200, 100, 3), np.uint8)
    np.save(tmp_path / "x.npy", images)
    items = read_items(Input(str(tmp_path / "x.npy")), work, start=3)
    assert [item.key for item in items] == [str(number) for number in range(3, 90)]
    np.testing.assert_array_equal(np.stack([item.image for item in items]), images[3:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing: No such file"),
        ("nothing/*.png", "expected a folder, a list or a pattern"),
        ("nothing.tar", "nothing.tar: No such file"),
        ("nothing.npy", "nothing.npy"),
        ("nothing.parquet", "nothing.parquet"),
        ("work", "work: holds no image"),
    ],
)
def test_an_input_that_is_not_there(tmp_path, work, name, message):
    def begin(source: Input) -> None:
        source.state()
        source.open(work)

    with pytest.raises(InputError, match=message):
        begin(Input(str(tmp_path / name)))
