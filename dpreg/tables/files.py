"""Finds the files of a table from a name, a folder or a pattern, checks them, and sorts them by name."""

import dataclasses
import glob
import os
import stat
import urllib.parse
from collections.abc import Iterable, Mapping

from dpreg.errors import InputError, is_one_line, quote_names
from dpreg.spelling import spell

# The endings of names, and the formats that they stand for.
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
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the value in the name of Hive's folder of rows with a missing value

Signature = tuple[tuple[str, int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a table.

    Attributes:
      path: its path.
      partition: the columns in the names of its folders, such as year=2024; None stands for a missing value.
    """

    path: str
    partition: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    @property
    def format(self) -> str:
        """csv, parquet, npz or npy; empty if the name has another ending."""
        return next((format for suffix, format in SUFFIXES.items() if self.path.lower().endswith(suffix)), "")


def list_files(name: str, setting: str) -> list[File]:
    """Lists the file of a name, the files in a folder and its subfolders, or those that match a pattern.

    Names that begin with . or _ are skipped, as in Spark and Arrow. `**` in a pattern stands for any folders.

    Args:
      name: the name, folder or pattern.
      setting: the setting with that name, for messages.

    Raises:
      InputError: if there is no file, the files have several or unknown formats, or a file cannot be opened, is not a
        regular file, or is listed twice.
    """
    if not name:
        raise InputError(f"{spell(setting, '')}: it is empty; name a file, a pattern or a folder")
    if not is_one_line(name):
        raise InputError(f"{spell(setting, name)}: has characters that cannot be printed; rename it")
    root = name
    if os.path.isdir(name):
        paths = _walk(name)
    elif os.path.lexists(name):
        paths, root = [name], os.path.dirname(name)
    else:
        root = _get_fixed_folder(name)
        matched = [path for path in glob.glob(name, recursive=True) if not _is_hidden(path, name)]
        paths = [file for path in matched for file in (_walk(path) if os.path.isdir(path) else [path])]
        paths = list(dict.fromkeys(map(os.path.normpath, paths)))
    paths.sort(key=lambda path: path.split(os.sep))
    files = [File(path, _parse_partition(path, root)) for path in paths]
    _refuse_formats(files, name, setting)
    _refuse_unreadable(files)
    return _normalize_integers(files)


def sign(files: Iterable[File]) -> Signature:
    """The absolute path, size, mtime and ctime of each file, from which a change of the files can be detected."""

    def sign_file(path: str) -> tuple[str, int, int, int]:
        status = os.stat(path)
        return os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns

    return tuple(sign_file(file.path) for file in files)


def _walk(folder: str) -> list[str]:
    """The paths of all files in a folder and its subfolders."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}; allow access, or name other files")

    paths, seen = list[str](), dict[tuple[int, int], str]()
    for current, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(current)
        first = seen.setdefault((status.st_dev, status.st_ino), current)
        if first != current:
            raise InputError(f"{current}: is the folder {first} again, by a link; remove the link, or use a pattern")
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "_"))]
        paths += [os.path.join(current, name) for name in names if not name.startswith((".", "_"))]
    return paths


def _is_hidden(path: str, pattern: str) -> bool:
    """Whether a name in the path begins with _, unless the pattern has such names; glob skips hidden files."""
    allowed = any(name.startswith(("_", "[_")) for name in pattern.split(os.sep))
    names = os.path.relpath(path, _get_fixed_folder(pattern) or ".").split(os.sep)
    return not allowed and any(name.startswith("_") for name in names)


def _get_fixed_folder(pattern: str) -> str:
    """The folder of a pattern before its first wildcard."""
    names = pattern.split(os.sep)
    fixed = next((i for i, name in enumerate(names) if glob.has_magic(name)), len(names) - 1)
    return os.sep.join(names[:fixed])


def _parse_partition(path: str, root: str) -> dict[str, str | None]:
    """The values in the names of the folders between `root` and a file, as Hive writes them: key=value, escaped."""
    columns = dict[str, str | None]()
    for name in os.path.relpath(os.path.dirname(path) or ".", root or ".").split(os.sep):
        key, equals, value = name.partition("=")
        key, value = urllib.parse.unquote(key).strip(), urllib.parse.unquote(value)
        if not (equals and key):
            continue
        if key in columns:
            raise InputError(f"{path}: two of its folders give a column {key!r}; rename one")
        columns[key] = None if value in (_NO_VALUE, "") else value
    return columns


def _normalize_integers(files: list[File]) -> list[File]:
    """Removes leading zeros from the values of keys that are integers in all folders, as in a column of integers."""
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
    """Raises InputError unless all files have the same format."""
    formats = ", ".join(SUFFIXES)
    unknown, known = [file.path for file in files if not file.format], {file.format for file in files} - {""}
    if not known:
        if os.path.lexists(name) and not os.path.isdir(name):
            raise InputError(
                f"{spell(setting, name)}: unknown kind; use {formats} (or tfds:NAME, with {spell('dataset')})"
            )
        missing = "no readable file in that folder" if os.path.isdir(name) else "no such file"
        raise InputError(f"{spell(setting, name)}: there is {missing}; name one, or a folder with some, of {formats}")
    if unknown:
        ending = next(suffix for suffix in SUFFIXES for file in files if file.path.lower().endswith(suffix))
        pattern = os.path.join(name if os.path.isdir(name) else _get_fixed_folder(name), "**", f"*{ending}")
        raise InputError(
            f"{spell(setting, name)}: {quote_names(unknown, 3)} cannot be read; use {formats}: "
            f"name only those files, by a pattern such as '{pattern}'"
        )
    if len(known) > 1:
        kinds = " and ".join(f".{kind}" for kind in sorted(known))
        raise InputError(
            f"{spell(setting, name)}: the files are of different kinds, {kinds}; name those of one kind, by a pattern"
        )


def _refuse_unreadable(files: list[File]) -> None:
    """Raises InputError for a pipe or a device, which could block when opened, and for a file that is listed twice."""
    seen = dict[tuple[int, int], str]()
    for file in files:
        if not is_one_line(file.path):
            raise InputError(f"{file.path!r}: the name has characters that cannot be printed; rename it")
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror}; remove it, or name others") from error
        if not stat.S_ISREG(status.st_mode):
            remedy = "write its rows to a file"
            raise InputError(f"{file.path}: is a pipe or a device, which can be read only once; {remedy}")
        first = seen.setdefault((status.st_dev, status.st_ino), file.path)
        if first != file.path:
            raise InputError(f"{file.path}: is the file {first} again, by a link; leave one out, by a pattern")
