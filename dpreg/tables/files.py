"""The files of a table: found by a name, a folder or a pattern, checked, and put in the order of their names."""

import dataclasses
import glob
import os
import stat
import urllib.parse
from collections.abc import Iterable, Mapping

from dpreg.errors import InputError, is_one_line, quote_names
from dpreg.spelling import spell

# How names end, and the format of such a file.
SUFFIXES = {
    ".csv": "csv",
    ".csv.gz": "csv",
    ".csv.bz2": "csv",
    ".csv.zst": "csv",
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".npz": "npz",
    ".npy": "npy",
}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # how Hive names the folder of rows without a value

Signature = tuple[tuple[str, int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a table.

    Attributes:
      path: the one that is opened, and that messages name.
      partition: the columns that the names of its folders give, such as year=2024; None is a missing value.
    """

    path: str
    partition: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    @property
    def format(self) -> str:
        """csv, parquet, npz or npy; nothing where the name has another ending."""
        return next((kind for suffix, kind in SUFFIXES.items() if self.path.lower().endswith(suffix)), "")


def list_files(name: str, setting: str) -> list[File]:
    """The files of one format in a folder and the folders in it, that match a pattern, or the one of that name.

    Names that begin with . or _ are left out, as Spark and Arrow do. `**` in a pattern stands for any folders.

    Raises:
      InputError: where there is none, where one is of no format that is read or of another one, cannot be opened, is
        no regular file, or is there twice.
    """
    if not name:
        raise InputError(f"{spell(setting, '')}: it is empty; name a file, a pattern or a folder")
    if not is_one_line(name):
        raise InputError(f"{spell(setting, name)}: has characters that cannot be printed; rename it")
    above = name
    if os.path.isdir(name):
        paths = _walk(name)
    elif os.path.lexists(name):
        paths, above = [name], os.path.dirname(name)
    else:
        above = _fixed_part(name)
        matched = [path for path in glob.glob(name, recursive=True) if not _is_hidden(path, name)]
        paths = [below for path in matched for below in (_walk(path) if os.path.isdir(path) else [path])]
        paths = list(dict.fromkeys(map(os.path.normpath, paths)))
    paths.sort(key=lambda path: path.split(os.sep))
    files = [File(path, _partition(path, above)) for path in paths]
    _refuse_formats(files, name, setting)
    _refuse_unreadable(files)
    return _with_numbers(files)


def sign(files: Iterable[File]) -> Signature:
    """Of each file (absolute path, size, time of its bytes, time of its name): it changes when the files do."""

    def of_one(path: str) -> tuple[str, int, int, int]:
        found = os.stat(path)
        return os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns

    return tuple(of_one(file.path) for file in files)


def _walk(folder: str) -> list[str]:
    """The paths of all files below a folder."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}; allow it, or name other files")

    paths, seen = list[str](), dict[tuple[int, int], str]()
    for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        found = os.stat(at)
        first = seen.setdefault((found.st_dev, found.st_ino), at)
        if first != at:
            raise InputError(f"{at}: is the folder {first} again, by a link; remove the link, or use a pattern")
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        paths += [os.path.join(at, name) for name in names if not name.startswith((".", "_"))]
    return paths


def _is_hidden(path: str, pattern: str) -> bool:
    """Whether a folder or file begins with _ though the pattern does not name such; those with . do not match."""
    named = any(part.startswith(("_", "[_")) for part in pattern.split(os.sep))
    below = os.path.relpath(path, _fixed_part(pattern) or ".").split(os.sep)
    return not named and any(part.startswith("_") for part in below)


def _fixed_part(pattern: str) -> str:
    """The folders of a pattern before its first wildcard."""
    parts = pattern.split(os.sep)
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return os.sep.join(parts[:fixed])


def _partition(path: str, above: str) -> dict[str, str | None]:
    """The values in folder names of a path below a folder, as Hive writes them: key=value, percent-encoded."""
    columns = dict[str, str | None]()
    for part in os.path.relpath(os.path.dirname(path) or ".", above or ".").split(os.sep):
        key, equals, value = part.partition("=")
        key, value = urllib.parse.unquote(key).strip(), urllib.parse.unquote(value)
        if not (equals and key):
            continue
        if key in columns:
            raise InputError(f"{path}: two of its folders give a column {key!r}; rename one")
        columns[key] = None if value in (_NO_VALUE, "") else value
    return columns


def _with_numbers(files: list[File]) -> list[File]:
    """A key whose values are whole numbers in all folders has numbers: 01 is 1, as in a column of them."""
    keys = dict.fromkeys(key for file in files for key in file.partition)
    for key in keys:
        values = {file.partition.get(key) for file in files} - {None}
        if all(value and value.removeprefix("-").isascii() and value.removeprefix("-").isdigit() for value in values):
            files = [
                dataclasses.replace(file, partition={**file.partition, key: str(int(value))})
                if (value := file.partition.get(key))
                else file
                for file in files
            ]
    return files


def _refuse_formats(files: list[File], name: str, setting: str) -> None:
    """Raises InputError unless all files are of one format."""
    formats = ", ".join(SUFFIXES)
    unknown, known = [file.path for file in files if not file.format], {file.format for file in files} - {""}
    if not known:
        if os.path.lexists(name) and not os.path.isdir(name):
            raise InputError(
                f"{spell(setting, name)}: unknown kind; use {formats} (or tfds:NAME, with {spell('dataset')})"
            )
        found = "no readable file in that folder" if os.path.isdir(name) else "no such file"
        raise InputError(f"{spell(setting, name)}: there is {found}; name one, or a folder with some, of {formats}")
    if unknown:
        ending = next(suffix for suffix in SUFFIXES for file in files if file.path.lower().endswith(suffix))
        pattern = os.path.join(name if os.path.isdir(name) else _fixed_part(name), "**", f"*{ending}")
        raise InputError(
            f"{spell(setting, name)}: {quote_names(unknown, 3)} cannot be read; use {formats}: "
            f"name those files alone by a pattern, such as '{pattern}'"
        )
    if len(known) > 1:
        kinds = " and ".join(f".{kind}" for kind in sorted(known))
        raise InputError(
            f"{spell(setting, name)}: the files are of different kinds, {kinds}; name those of one, by a pattern"
        )


def _refuse_unreadable(files: list[File]) -> None:
    """Raises InputError for a file that is none, which to open could wait for ever, or that is there twice."""
    seen = dict[tuple[int, int], str]()
    for file in files:
        if not is_one_line(file.path):
            raise InputError(f"{file.path!r}: the name has characters that cannot be printed; rename it")
        try:
            found = os.stat(file.path)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror}; remove it, or name others") from error
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{file.path}: is a pipe or a device, which is read only once; write its rows to a file")
        first = seen.setdefault((found.st_dev, found.st_ino), file.path)
        if first != file.path:
            raise InputError(f"{file.path}: is the file {first} again, by a link; leave one out, by a pattern")
