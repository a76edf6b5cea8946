"""Opens the folder of a run's outputs, which all its processes share."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax

from dpreg.distributed import processes
from dpreg.errors import InputError
from dpreg.files import publish
from dpreg.spelling import spell


@contextlib.contextmanager
def open_workdir(name: str | None, keep: bool = True) -> Iterator[pathlib.Path]:
    """Creates the folder if it is missing, checks it in all processes, and locks it against other runs.

    Args:
      name: the path; None for a new folder in runs/, named after the time.
      keep: False deletes the folder at the end if it was created here. An InputError deletes it as well, unless it has
        checkpoints.

    Raises:
      InputError: when the folder cannot be written, another run uses it, or processes see different folders there.
    """
    if not name and jax.process_count() > 1:
        raise InputError(f"{spell('workdir')}: several processes need a folder that all of them see; name one")
    path = pathlib.Path(name or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
    with contextlib.ExitStack() as locks, contextlib.ExitStack() as folders:  # unlock after the folder is deleted
        if jax.process_index() == 0:
            folders.enter_context(make_folder(path, keep))
            locks.enter_context(_lock(path))
        processes.allgather_text()
        try:
            with tempfile.NamedTemporaryFile(dir=path, prefix=".process-") as own_file:
                # Every process looks for the files of all processes before any of them is deleted.
                names = processes.allgather_text(pathlib.Path(own_file.name).name)
                missing = [process for process, name in enumerate(names) if not (path / name).exists()]
                if missing:
                    raise InputError(
                        f"{spell('workdir', path)}: process {jax.process_index()} and process {missing[0]} see "
                        "different folders there; name one that all see"
                    )
                processes.allgather_text()
        except OSError as error:
            raise _make_error(path, error) from error
        processes.allgather_text()
        yield path


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    """Locks a folder against other runs. The lock ends with the process, even if it is killed."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock folders
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{spell('workdir', path)}: another run uses it; wait for its end, or name another"
                ) from error
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def make_folder(path: pathlib.Path, keep: bool = True) -> Iterator[pathlib.Path]:
    """Creates a folder and its parents if they are missing.

    Args:
      path: the folder.
      keep: False deletes at the end what was created here. An InputError deletes it as well, unless it has checkpoints.

    Raises:
      InputError: when the folder cannot be created.
    """
    created = list[pathlib.Path]()
    try:
        try:
            created = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                created = []  # another run has created it in the meantime
                if not path.is_dir():
                    raise
        except OSError as error:
            raise _make_error(path, error) from error
        yield path
    except InputError:
        keep = any(path.glob("checkpoints/*"))
        raise
    finally:
        if created and not keep:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run uses it by now
                for folder in created[1:]:
                    folder.rmdir()


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file, so that it is always complete: the new text replaces the old one at once."""
    new = path.with_name(f".new-{path.name}")
    try:
        new.write_text(text, encoding="utf-8")
        publish(new, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def _make_error(path: pathlib.Path, error: OSError) -> InputError:
    return InputError(f"{spell('workdir', path)}: cannot be written: {error.strerror}; name another folder")
