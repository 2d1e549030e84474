"""Where image files are read from: a folder or a zip archive, read in place and never unpacked."""

from __future__ import annotations

import csv
import io
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

IMAGES = (".png", ".jpg", ".jpeg")
# Largest file that is read, in bytes: no image or split file of a data set is larger.
LARGEST = 1 << 27


class DatasetError(FileNotFoundError):
    """A data set is missing or damaged; the message says what to put where."""


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the data sets, which may not exist: the one given, that of ``LMG_DATA``, or ``./data``."""
    return Path(root if root is not None else os.environ.get("LMG_DATA", "data")).expanduser()


class Source(ABC):
    """Files by relative name (with ``/``), in a folder or an archive: ``path``."""

    path: Path

    @abstractmethod
    def stamps(self) -> dict[str, tuple[int, int]]:
        """List the files: by name, in sorted order, two numbers that change when the file does."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a file that :meth:`stamps` lists; raises a DatasetError if that fails, or if no image is as large."""


class FolderSource(Source):
    """The files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stamps(self) -> dict[str, tuple[int, int]]:
        """List the regular files with their size and modification time.

        Raises a DatasetError if something else (a FIFO, a link that leads nowhere) has the name of an image.
        """
        found = {}
        seen: set[str] = set()
        for folder, folders, files in os.walk(self.path, followlinks=True):
            seen.add(os.path.realpath(folder))
            # Hidden folders hold no data; a link to a folder visited before would make an endless walk.
            folders[:] = [
                each
                for each in folders
                if not each.startswith(".") and os.path.realpath(os.path.join(folder, each)) not in seen
            ]
            for file in files:
                name = Path(folder, file).relative_to(self.path).as_posix()
                status = _regular(os.path.join(folder, file))
                if status is not None:
                    found[name] = status.st_size, status.st_mtime_ns
                elif name.lower().endswith(IMAGES) and not file.startswith("."):
                    raise DatasetError(
                        f"{name} in {self.path} is no regular file (a link that leads nowhere, a pipe or a device). "
                        "Remove it, or put the image in its place."
                    )
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        """Read a file."""
        try:
            with (self.path / name).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                data = stream.read() if size <= LARGEST else b""
        except OSError as error:
            raise DatasetError(f"{name} in {self.path} cannot be read ({error}). Copy it again.") from error
        check_size(size, name, self.path)
        return data


class ZipSource(Source):
    """The members of a zip archive. They are read, never extracted: no path is made from their names.

    Raises a DatasetError if the archive is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise DatasetError(f"{path} is damaged ({error}). Download or copy it again.") from error

    def stamps(self) -> dict[str, tuple[int, int]]:
        """List the members with their size and checksum, without those that macOS adds."""
        members = [each for each in self._archive.infolist() if not each.filename.startswith("__MACOSX/")]
        files = [each for each in members if not each.is_dir()]
        return {each.filename: (each.file_size, each.CRC) for each in sorted(files, key=lambda each: each.filename)}

    def read(self, name: str) -> bytes:
        """Read a member."""
        # Of a member no more is unpacked than the archive states as its size.
        check_size(self._archive.getinfo(name).file_size, name, self.path)
        try:
            return self._archive.read(name)
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error, RuntimeError) as error:
            raise DatasetError(f"{name} in {self.path} is damaged ({error}). Download or copy it again.") from error


def _regular(path: str) -> os.stat_result | None:
    """The status of a regular file; None for anything else, and for a link that leads nowhere."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def check_size(size: int, name: str, where: Path) -> None:
    """Raise a DatasetError if a file is larger than any image, before it is read."""
    if size > LARGEST:
        raise DatasetError(
            f"{name} in {where} holds {size / 1e6:.0f} MB, and files of more than {LARGEST / 1e6:.0f} MB are not "
            "read: no image is as large. Remove it, or put a smaller image in its place."
        )


class Line(NamedTuple):
    """A line of a split file that names an image."""

    split: str
    number: int
    label: str


def read_split(
    source: Source, name: str, folder: str, known: Container[str], taken: dict[str, Line]
) -> dict[str, list[str]]:
    """Read a split file, a csv with the columns ``filename`` and ``label``: names of the images by label, both sorted.

    ``folder`` is the prefix of the images' names, ``known`` holds all names in the source, and ``taken`` the lines that
    named images before, of this split and others; those of this file are added. Raises a DatasetError if it is not such
    a file, or if it names a file that does not exist, lies outside the folder, or was named before.
    """
    where = f"{name} of {source.path}"
    found: dict[str, list[str]] = {}
    for number, file, label in _rows(source, name, where):
        if not file or not label:
            raise DatasetError(f"Line {number} of {where} lacks its filename or label. Copy it anew.")
        if file in {".", ".."} or any(mark in file for mark in ("/", "\\", ":", "\0")):
            raise DatasetError(
                f"Line {number} of {where} names {file!r}; only plain file names are read, so that none leaves the "
                f"folder {folder}. Correct the file or copy it anew."
            )
        if folder + file not in known:
            raise DatasetError(
                f"Line {number} of {where} names {file!r}, which is not in its folder {folder}. Unpack or copy the "
                "images again."
            )
        # Twice in a class, an image would be in the support and in the query set of one episode. (The same class in
        # two splits is an error of its own.)
        before = taken.setdefault(file, Line(name, number, label))
        if before != (name, number, label) and (before.split == name or before.label != label):
            raise DatasetError(
                f"Line {number} of {where} names {file!r} with the label {label!r}, which line {before.number} of "
                f"{before.split} named with {before.label!r}. Each image stands once: remove one of the two lines."
            )
        found.setdefault(label, []).append(folder + file)
    if not found:
        raise DatasetError(f"{where} holds no rows with the columns filename and label. Copy it anew.")
    return {label: sorted(found[label]) for label in sorted(found)}


def _rows(source: Source, name: str, where: str) -> Iterator[tuple[int, str | None, str | None]]:
    """The lines of a split file one by one: number, filename, label."""
    try:
        reader = csv.DictReader(io.StringIO(source.read(name).decode("utf-8-sig")))
        if not {"filename", "label"} <= set(reader.fieldnames or ()):
            return
        for row in reader:
            yield reader.line_num, row["filename"], row["label"]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{where} is damaged ({error}). Copy it anew.") from error
