"""The inputs of a batch job: each kind, from any number on, in shards."""

import io
import json
import os
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convoy.client import images
from convoy.client.batch import Input, InputError, Row, Shard, files
from convoy.client.batch.inputs import Chain
from convoy.client.errors import ImageError
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


@pytest.fixture(params=["folder", "list", "tar", "tar.gz", "zip", "parquet", "npy"])
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
        case "zip":
            path = tmp_path / "images.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for number, content in enumerate(FILES):
                    archive.writestr(f"train/{number:04}.jpg", content)
                    archive.writestr(f"train/{number:04}.cls", b"3")
            return path
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
        assert list(source.keys(start)) == [item.key for item in rest]
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


def test_a_folder_is_read_recursively_in_order(folder, work):
    names = keys(folder, work)
    assert names == sorted(names)
    assert names[0] == "0/00.JPG"
    first = read_items(Input(str(folder)), work)[0]
    assert Path(first.image).read_bytes() == FILES[0]


def test_many_names_are_sorted_on_disk(folder, work, monkeypatch):
    expected = keys(folder, work)
    (work / "inputs.json").unlink()
    monkeypatch.setattr(files, "_NAMES_IN_MEMORY", 4)
    assert keys(folder, work) == expected
    assert {path.name for path in work.iterdir()} == {"inputs", "inputs.json"}


def test_a_job_ignores_changes_to_its_list_of_files(folder, work):
    before = keys(folder, work)
    (folder / "0" / "000.png").write_bytes(b"newer")
    (folder / "1" / "01.png").unlink()
    assert keys(folder, work) == before


def test_a_name_that_is_not_utf8_becomes_text(tmp_path, work):
    folder = os.fsencode(tmp_path / "images")
    os.mkdir(folder)
    path = os.path.join(folder, b"caf\xe9\n.png")
    with open(path, "wb") as file:
        file.write(b"content")
    (item,) = read_items(Input(str(tmp_path / "images")), work)
    assert Row(item.key).key == "caf\\xe9\n.png"
    assert os.fsencode(item.image) == path


def test_a_glob_crosses_folders(folder, work):
    assert len(keys(folder / "**" / "*.png", work)) == COUNT // 2
    (work / "inputs.json").unlink()
    assert keys(folder / "[01]" / "0?.*", work)[0] == str(folder / "0" / "00.JPG")


def test_a_list_keeps_its_order(tmp_path, work):
    listed = tmp_path / "some.list"
    listed.write_text("b.png\r\n\na/ä.jpg\nmissing\nb.png\n")
    assert keys(listed, work) == ["b.png", "a/ä.jpg", "missing", "b.png"]


def test_only_images_of_a_tar_are_read(tmp_path, work):
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


@pytest.mark.slow
def test_the_members_of_a_tar_are_not_held_in_memory(tmp_path, work):
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


def test_an_ambiguous_parquet_column_must_be_named(tmp_path, work):
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
def test_an_array_of_another_kind_is_rejected(tmp_path, work, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=r"x\.npy: "):
        keys(tmp_path / "x.npy", work)


def test_an_array_is_read_in_chunks(tmp_path, work):
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
def test_a_missing_input_is_an_error(tmp_path, work, name, message):
    def begin(source: Input) -> None:
        source.state()
        source.open(work)

    with pytest.raises(InputError, match=message):
        begin(Input(str(tmp_path / name)))


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def content_of(image: object) -> object:
    return str(image) if isinstance(image, ImageError) else image


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_links_in_a_tar_are_images_of_their_own(tmp_path, work, suffix):
    path = tmp_path / f"links.{suffix}"
    symlink = tarfile.SYMTYPE
    with tarfile.open(path, f"w:{suffix[4:]}" if "." in suffix else "w") as archive:
        add(archive, "a/one.png", b"one")
        archive.addfile(link("a/early.png", "late.png", symlink))
        archive.addfile(link("b/hard.png", "a/one.png"))
        archive.addfile(link("b/soft.png", "../a/one.png", symlink))
        archive.addfile(link("b/again.png", "soft.png", symlink))
        add(archive, "a/one.png", b"replaced")
        archive.addfile(link("b/second.png", "a/one.png"))
        archive.addfile(link("b/dangling.png", "nowhere.png", symlink))
        archive.addfile(link("b/loop.png", "loop.png", symlink))
        add(archive, "data.bin", b"not named so")
        archive.addfile(link("c/renamed.png", "data.bin"))
        add(archive, "a/late.png", b"late")
        archive.addfile(tarfile.TarInfo("last.png"))
    expected = {
        "a/one.png": b"replaced",
        "a/early.png": b"late",
        "b/hard.png": b"one",
        "b/soft.png": b"replaced",
        "b/again.png": b"replaced",
        "b/second.png": b"replaced",
        "b/dangling.png": "image: a link to b/nowhere.png, which is not in the archive",
        "b/loop.png": "image: a link to b/loop.png, which is not in the archive",
        "c/renamed.png": b"not named so",
        "a/late.png": b"late",
        "last.png": b"",
    }
    source = Input(str(path)).open(work)
    items = list(source.items(0))
    assert (len(items), source.total) == (12, 12)
    assert {item.key: content_of(item.image) for item in items} == expected  # the last of each key
    assert items[0].image == b"one"
    assert source.left_out == {"not named like an image": 1}
    for start in range(13):
        rest = [(item.key, content_of(item.image)) for item in source.items(start)]
        assert rest == [(item.key, content_of(item.image)) for item in items[start:]]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_a_member_above_the_limit_of_a_file_is_an_error(tmp_path, work, suffix, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    path = tmp_path / f"x.{suffix}"
    contents = {"small.png": b"s" * 1000, "large.png": b"l" * 1001, "last.png": b"last"}
    expected = {**contents, "large.png": "image: expected at most 1000 bytes, got 1001"}
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as archive:
            for name, content in contents.items():
                add(archive, name, content)
            archive.addfile(link("hard.png", "large.png"))
        expected["hard.png"] = expected["large.png"]
    found = {item.key: content_of(item.image) for item in read_items(Input(str(path)), work)}
    assert found == expected


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tars_that_follow_each_other_in_a_file(tmp_path, work, suffix):
    first = tar(tmp_path / f"a.{suffix}", f"w:{suffix[4:]}" if "." in suffix else "w")
    whole = tmp_path / f"whole.{suffix}"
    whole.write_bytes(first.read_bytes() * 3)
    items = read_items(Input(str(whole)), work)
    assert [item.image for item in items] == FILES * 3
    assert {path.name for path in work.iterdir()} == {"inputs", "inputs.json"}


def test_a_tar_whose_second_part_is_cut(tmp_path, work):
    content = tar(tmp_path / "a.tar", "w").read_bytes()
    path = tmp_path / "whole.tar"
    path.write_bytes(content + content[:5000])
    with pytest.raises(InputError, match=r"after \d+ images"):
        keys(path, work)


def test_bytes_after_a_tar_are_counted(tmp_path, work):
    path = tar(tmp_path / "a.tar", "w")
    path.write_bytes(path.read_bytes() + b"rubbish" * 200)
    source = Input(str(path)).open(work)
    assert source.total == COUNT
    assert source.left_out["bytes after the end of the archive"] == 1


def test_a_tar_name_that_is_not_utf8(tmp_path, work):
    path = tmp_path / "latin1.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        add(archive, "caf\xe9.png", b"content")
    (item,) = read_items(Input(str(path)), work)
    assert (Row(item.key).key, item.image) == ("caf\\xe9.png", b"content")


def test_a_damaged_member_of_a_zip_is_an_error_of_its_own(tmp_path, work):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"first content")
        archive.writestr("b.png", b"second content")
        archive.writestr("notes.txt", b"")
    path.write_bytes(path.read_bytes().replace(b"first content", b"first CONTENT"))
    source = Input(str(path)).open(work)
    first, second = source.items(0)
    assert "Bad CRC" in str(first.image)
    assert second.image == b"second content"
    assert source.left_out == {"not named like an image": 1}


@pytest.mark.parametrize("case", ["gnu-hardlink.tar", "latin1.tar", "concat.tar"])
def test_the_reported_archives(work, case):
    path = Path(__file__).parents[3] / "shared" / "cases" / "batch" / case
    if not path.exists():
        pytest.skip("the shared cases are not beside this checkout")
    source = Input(str(path)).open(work)
    rows = [Row(item.key) for item in source.items(0)]
    assert len(rows) == source.total > 0
    assert not any(isinstance(item.image, ImageError) for item in source.items(0))


def test_linked_folders_are_followed(folder, work):
    (folder / "9").symlink_to(folder / "0", target_is_directory=True)
    (folder / "0" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "2" / "self").symlink_to(folder / "2", target_is_directory=True)
    source = Input(str(folder)).open(work)
    inside = [name for name in keys(folder, work) if "/" not in name[2:]]
    ninth = [name[2:] for name in inside if name.startswith("9/")]
    assert ninth == [name[2:] for name in inside if name.startswith("0/")]
    assert source.left_out["a symbolic link to a folder that it lies in"] >= 2


def test_files_left_out_are_counted_by_reason(folder, work):
    (folder / "broken.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "thumbs.db").write_bytes(b"")
    source = Input(str(folder)).open(work)
    assert source.total == COUNT + 1  # a broken link is a row with its error
    assert source.left_out == {"not named like an image": 2, "a pipe, socket or device": 1}
    again = Input(str(folder)).open(work)
    assert again.left_out == source.left_out


def test_a_list_is_resumed_from_another_folder(folder, tmp_path, work, monkeypatch):
    listed = tmp_path / "list.txt"
    listed.write_text("images/0/00.JPG\n")
    monkeypatch.chdir(tmp_path)
    Input(str(listed)).open(work)
    monkeypatch.chdir("/")
    (item,) = read_items(Input(str(listed)), work)
    assert (item.key, Path(item.image).read_bytes()) == ("images/0/00.JPG", FILES[0])


def test_several_inputs_are_one_after_the_other(folder, tmp_path, work):
    names = (
        str(folder),
        str(tar(tmp_path / "b.tar", "w")),
        str(parquet(tmp_path / "c.parquet", pa.array(FILES, pa.binary()))),
    )
    source = Input(names).open(work)
    items = list(source.items(0))
    assert len(items) == source.total == 3 * COUNT
    assert len({item.key for item in items}) == 3 * COUNT
    assert items[COUNT].key == f"{names[1]}/train/0000.jpg"
    assert items[-1].key == f"{names[2]}/{COUNT - 1}"
    for start in (0, 1, COUNT - 1, COUNT, COUNT + 1, 3 * COUNT - 1, 3 * COUNT):
        expected = [item.key for item in items[start:]]
        assert [item.key for item in source.items(start)] == expected
        assert list(source.keys(start)) == expected


def test_shards_of_several_inputs_are_disjoint_and_complete(folder, tmp_path):
    names = (str(folder), str(tar(tmp_path / "b.tar", "w")), str(tmp_path / "missing.tar"))
    found = []
    for index in range(3):
        work = tmp_path / f"work{index}"
        work.mkdir()
        found += [item.key for item in Input(names, Shard(index, 3)).open(work).items(0)]
    assert len(found) == len(set(found)) == 2 * COUNT + 1


def test_braces_and_patterns_name_archives(tmp_path, work):
    for number in range(8, 12):
        tar(tmp_path / f"s-{number:03}.tar", "w")
    for name in ("s-{008..011}.tar", "s-*.tar", "s-0{08,09,10,11}.tar"):
        folder = work / str(len(list(work.iterdir())))
        folder.mkdir()
        source = Input(str(tmp_path / name)).open(folder)
        assert isinstance(source, Chain)
        assert (len(source.parts), source.total) == (4, 4 * COUNT)
    (tmp_path / "s-{1}.tar").write_bytes((tmp_path / "s-008.tar").read_bytes())
    assert len(keys(tmp_path / "s-{1}.tar", tmp_path)) == COUNT


def test_a_folder_of_parquet_files_is_read_as_they_are_written_by_spark(tmp_path, work):
    folder = tmp_path / "table"
    (folder / "data").mkdir(parents=True)
    (folder / "_SUCCESS").write_bytes(b"")
    for number in range(2):
        parquet(folder / "data" / f"part-{number}.parquet", pa.array(FILES, pa.binary()))
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "half.parquet").write_bytes(b"")
    assert [i.image for i in read_items(Input(str(folder)), work)] == FILES * 2


def test_one_of_several_inputs_that_cannot_be_read_is_one_item(tmp_path, work):
    good, cut = tar(tmp_path / "good.tar", "w"), tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[:5000])
    source = Input((str(cut), str(good), str(tmp_path / "missing.parquet"))).open(work)
    items = list(source.items(0))
    assert len(items) == source.total == COUNT + 2
    assert "after " in str(items[0].image)
    assert items[0].key == str(cut)
    assert set(source.failures) == {str(cut), str(tmp_path / "missing.parquet")}
    # A resumed job counts the same items, whatever became of the archive meanwhile.
    cut.write_bytes(good.read_bytes())
    again = Input((str(cut), str(good), str(tmp_path / "missing.parquet"))).open(work)
    assert again.total == source.total


def test_columns_of_a_parquet_file(tmp_path, work):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {"image": pa.array(FILES, pa.binary()), "label": [n % 2 for n in range(COUNT)]}
    )
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    source = Input(str(tmp_path / "x.parquet")).open(work)
    found = [row["label"] for row in source.columns(1, ("label",))]
    assert found == [("cat", "dog")[n % 2] for n in range(1, COUNT)]
    with pytest.raises(InputError, match="expected columns of image, label, got 'x'"):
        next(iter(source.columns(0, ("x",))))


def test_an_input_without_columns(folder, work):
    with pytest.raises(InputError, match="files have no columns: label"):
        next(iter(Input(str(folder)).open(work).columns(0, ("label",))))
