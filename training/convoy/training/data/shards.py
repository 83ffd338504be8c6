"""Shards: WebDataset's tar files and Hugging Face's Parquet files, local or remote.

The images of a tar file on this machine are read in place. Those of any other shard are unpacked
once into the cache, one file per shard, so that training reads them in any order.
"""

import glob
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np

from convoy.training.data.cache import Cache, file_identity
from convoy.training.data.images import OTHER_SUFFIXES, SUFFIXES, ImageRef, printable
from convoy.training.data.listing import Found, LeftOut, check_name, make_found, split_in, split_of
from convoy.training.data.table import IMAGE_COLUMNS, LABEL_COLUMNS, choose_column
from convoy.training.errors import DataError

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PARQUET = ".parquet"
_KINDS = (*_TAR_SUFFIXES, _PARQUET)
_LABEL_SUFFIXES = (".cls", ".label", ".txt", ".json")
_MAX_LABEL_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# The fields that change with the content of a remote file; others change with every call.
_IDENTITY_KEYS = (
    "size",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "md5",
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One archive.

    Attributes:
        url: Its path, or a URL that fsspec opens.
        split: Of all of its images.
    """

    url: str
    split: str

    @property
    def local(self) -> Path | None:
        """Its path if it is on this machine, else None."""
        return None if "://" in self.url else Path(self.url)


@dataclass(frozen=True, slots=True)
class _Sample:
    """An image of a shard: its position in the shard, or its content."""

    name: str
    label: str
    offset: int = 0
    size: int = 0
    content: bytes = b""


def find(pattern: str, cache: Cache) -> Found:
    """List the images of shards.

    Args:
        pattern: A shard, a folder of shards, or a glob; a path or a URL. {00..09} and {a,b} stand
            for several. A file with the word train, valid or test in its name, or in a folder of
            such a name, belongs to that split; all others belong to train.
        cache: Where shards are unpacked.

    Raises:
        DataError: There is no shard, one cannot be read or unpacked, or lacks images or labels.
    """
    samples: list[tuple[ImageRef, str, str]] = []
    left_out: list[LeftOut] = []
    names: tuple[str, ...] = ()
    for shard in list_shards(pattern):
        try:
            refs, labels, found_names = _open(shard, cache, left_out)
        except DataError:
            raise
        # Each of fsspec's file systems, and pyarrow, raises errors of its own.
        except Exception as error:
            raise DataError(f"data {shard.url}: {_reason(error)}") from error
        names = names or found_names
        for ref, label in zip(refs, labels, strict=True):
            samples.append((ref, check_name(f"data {shard.url}: label", label), shard.split))
    return make_found(f"data {pattern}", samples, left_out, names)


def list_shards(pattern: str) -> list[Shard]:
    """Return the shards that a pattern names, in the order of their names.

    Raises:
        DataError: There is none.
    """
    urls: list[str] = []
    for each in _expand_braces(pattern):
        try:
            urls += _expand(each)
        # Each of fsspec's file systems raises errors of its own.
        except Exception as error:
            raise DataError(f"data {each}: {_reason(error)}") from error
    if not urls:
        raise DataError(f"data: expected {', '.join(_KINDS)} files at {pattern}, found none")
    return [Shard(url, _split_of(url, pattern)) for url in urls]


def _split_of(url: str, pattern: str) -> str:
    """Return the split by the file's name, else by the folder it is in."""
    *_, folder, name = ["", *url.rstrip("/").split("/")]
    return split_in(name) or split_of(folder) or "train"


def _expand_braces(pattern: str) -> list[str]:
    """Return every name that {000..012} and {a,b} stand for."""
    parts = _BRACES.split(pattern)
    choices = [_choices(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(each) for each in product(*choices)]


def _choices(inside: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return inside.split(",")


def _expand(pattern: str) -> list[str]:
    """Return the shards of one path or URL, which may be a folder or a glob."""
    if "://" not in pattern:
        path = Path(pattern)
        if path.is_dir():
            return sorted(str(each) for each in path.rglob("*") if each.name.endswith(_KINDS))
        return [pattern] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
    files, path_there = fsspec.core.url_to_fs(pattern)
    if glob.has_magic(pattern):
        return sorted(map(files.unstrip_protocol, files.glob(path_there)))
    if pattern.endswith(_KINDS):
        return [pattern]
    found = files.find(path_there)
    return sorted(files.unstrip_protocol(each) for each in found if each.endswith(_KINDS))


def _open(
    shard: Shard, cache: Cache, left_out: list[LeftOut]
) -> tuple[list[ImageRef], list[str], tuple[str, ...]]:
    """Return a shard's images, their labels, and the classes if the shard names them."""
    local = shard.local
    if local and shard.url.endswith(".tar"):
        with local.open("rb") as file:
            samples = list(_read_tar(shard, file, left_out))
        refs = [
            ImageRef(local, each.offset, each.size, f"{local}: {each.name}") for each in samples
        ]
        return refs, [each.label for each in samples], ()
    pack, index = (
        cache.entry("pack", shard.url, _identity(shard), suffix=suffix)
        for suffix in ("pack", "npz")
    )
    unpacked = cache.load(index, _read_index)
    if unpacked is None or not _is_whole(pack, unpacked):
        unpacked = _unpack(shard, cache, pack, index)
    left_out += [LeftOut(*each) for each in unpacked["left_out"].tolist()]
    refs = [
        ImageRef(pack, offset, size, f"{shard.url}: {name}")
        for offset, size, name in zip(
            *(unpacked[key].tolist() for key in ("offsets", "sizes", "names")), strict=True
        )
    ]
    return refs, unpacked["labels"].tolist(), tuple(unpacked["classes"].tolist())


def _is_whole(pack: Path, unpacked: dict[str, Any]) -> bool:
    return pack.is_file() and pack.stat().st_size == int(unpacked["sizes"].sum())


def _identity(shard: Shard) -> object:
    if shard.local:
        return file_identity(shard.local)
    files, path = fsspec.core.url_to_fs(shard.url)
    info = files.info(path)
    return sorted((key, str(info[key])) for key in _IDENTITY_KEYS if key in info)


def _unpack(shard: Shard, cache: Cache, pack: Path, index: Path) -> dict[str, Any]:
    """Write the concatenated images of a shard, and the position of each."""
    found: list[_Sample] = []
    left_out: list[LeftOut] = []
    classes: list[str] = []

    def write(target: IO[bytes]) -> None:
        with fsspec.open(shard.url, "rb") as file:
            samples = (
                _read_parquet(shard, file, classes)
                if shard.url.endswith(_PARQUET)
                else _read_tar(shard, file, left_out)
            )
            for sample in _reading(shard, samples):
                offset = target.tell()
                target.write(sample.content)
                found.append(_Sample(sample.name, sample.label, offset, len(sample.content)))

    if not cache.store(pack, write):
        raise DataError(f"data {shard.url}: expected room in the cache {cache.folder} to unpack it")
    arrays: dict[str, Any] = {
        "offsets": np.array([each.offset for each in found], np.int64),
        "sizes": np.array([each.size for each in found], np.int64),
        "names": np.array([each.name for each in found], np.str_),
        "labels": np.array([each.label for each in found], np.str_),
        "classes": np.array(classes, np.str_),
        "left_out": np.array([(e.name, e.reason) for e in left_out], np.str_).reshape(-1, 2),
    }
    cache.store(index, lambda file: np.savez(file, **arrays))
    return arrays


def _reading(shard: Shard, samples: Iterator[_Sample]) -> Iterator[_Sample]:
    """Yield the images of an archive; its errors are not those of the cache.

    Raises:
        DataError: It cannot be read.
    """
    try:
        yield from samples
    except DataError:
        raise
    # Each of fsspec's file systems, tarfile and pyarrow raise errors of their own.
    except Exception as error:
        raise DataError(f"data {shard.url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_index(path: Path) -> dict[str, Any]:
    # Opened here, since NumPy leaves a damaged file open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return dict(stored.items())


def _read_tar(shard: Shard, file: IO[bytes], left_out: list[LeftOut]) -> Iterator[_Sample]:
    """Yield the images of a tar file.

    WebDataset stores the files of a sample one after the other, with the same name up to the first
    dot: 0001.jpg, 0001.cls. Without such a label the class is the folder that the image is in.
    """
    in_place = shard.local is not None and shard.url.endswith(".tar")
    empty = True
    with tarfile.open(fileobj=file, mode="r:" if in_place else "r|*") as archive:
        files = (member for member in archive if member.isfile())
        for key, members in groupby(files, lambda member: _key_and_suffix(member.name)[0]):
            image, label = None, ""
            for member in members:
                suffix = _key_and_suffix(member.name)[1]
                if suffix in SUFFIXES | OTHER_SUFFIXES and image is None:
                    content = b"" if in_place else _content(archive, member)
                    image = _Sample(member.name, "", member.offset_data, member.size, content)
                elif suffix in _LABEL_SUFFIXES and member.size <= _MAX_LABEL_BYTES:
                    label = label or _label(shard, member.name, _content(archive, member))
                else:
                    name = printable(f"{shard.url}: {member.name}")
                    left_out.append(LeftOut(name, f"has the suffix {suffix}"))
            if image is None:
                left_out.append(
                    LeftOut(printable(f"{shard.url}: {key}"), "is a sample without an image")
                )
                continue
            empty = False
            label = label or key.rpartition("/")[0].rpartition("/")[2]
            if not label:
                raise DataError(
                    f"data {shard.url}: {printable(image.name)}: expected a label, from a file "
                    f"{printable(key)}.cls, .txt or .json after it, or from a folder"
                )
            yield replace(image, label=label)
    if empty:
        raise DataError(f"data {shard.url}: expected images, found none")


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{extension.lower()}"


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _label(shard: Shard, name: str, content: bytes) -> str:
    """Return the label in a file of a sample: its text, or a JSON object's label."""
    text = content.decode("utf-8", "surrogateescape").strip()
    if not name.endswith(".json"):
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"data {shard.url}: {name}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        return str(value)
    wanted = next((key for key in LABEL_COLUMNS if key in value), None)
    return "" if wanted is None else str(value[wanted])


def _read_parquet(shard: Shard, file: IO[bytes], classes: list[str]) -> Iterator[_Sample]:
    """Yield the images of a Parquet file as Hugging Face writes it.

    A column of images is binary, or a struct with a field `bytes`. A column of numbers has the
    names of its classes in the schema's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # pyarrow seeks; some of fsspec's files do so slowly, so it reads ahead.
    table = pq.ParquetFile(pa.PythonFile(file, mode="r"))
    schema = table.schema_arrow
    where = f"data {shard.url}"
    image_column = _image_column(where, schema)
    label_column = choose_column(where, schema.names, LABEL_COLUMNS)
    classes += _class_names(schema, label_column)
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[image_column, label_column]):
        images, labels = batch.column(0).to_pylist(), batch.column(1).to_pylist()
        for image, label in zip(images, labels, strict=True):
            content = image.get("bytes") if isinstance(image, dict) else image
            name = (image.get("path") if isinstance(image, dict) else None) or f"row {row}"
            if content is None or label is None:
                raise DataError(f"{where}: row {row}: expected an image's bytes and a label")
            yield _Sample(name, classes[label] if classes else str(label), content=content)
            row += 1


def _image_column(where: str, schema: Any) -> str:
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    able = [each.name for each in schema if holds_images(each.type)]
    if not able:
        raise DataError(
            f"{where}: expected a column of images (binary, or a struct with bytes), found "
            f"{', '.join(schema.names)}"
        )
    return able[0] if len(able) == 1 else choose_column(where, able, IMAGE_COLUMNS)


def _class_names(schema: Any, column: str) -> list[str]:
    """Return the class names of a column of numbers, if the file has them."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in names]
