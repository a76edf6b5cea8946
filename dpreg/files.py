"""Publishes complete files: they get their final names after all their bytes are on the disk."""

import contextlib
import os
import pathlib


def publish(new: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a file, or a folder with its content, to its final name, after its bytes are on the disk.

    Even after a power cut, `path` is either what it was before, or all of `new`.

    Raises:
      OSError: when a file cannot be written, or `path` is a folder that is not empty.
    """
    for file in (*(new.rglob("*") if new.is_dir() else ()), new):
        _sync(file)
    new.replace(path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk. Some file systems cannot sync folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
