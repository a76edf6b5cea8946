"""Files that are promised to be whole: they get their name once all of their bytes are on the disk."""

import contextlib
import os
import pathlib


def publish(new: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a file, or a folder with all that is in it, its final name.

    Also after a power cut there is either what was at `path` before, or all of `new`.

    Raises:
      OSError: when it cannot be written, or a folder that is not empty has the name.
    """
    for file in (*(new.rglob("*") if new.is_dir() else ()), new):
        _sync(file)
    new.replace(path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    """Waits until a file is on the disk, or the names in a folder, where the file system syncs folders at all."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
