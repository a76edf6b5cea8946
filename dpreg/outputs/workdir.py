"""The folder of a run's outputs, the same for all its processes."""

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
    """The folder, made where there is none, checked before anything costly, and held against other runs.

    Args:
      name: None for a new folder in runs/, named by the time.
      keep: False takes the folder away at the end, if it was made here; an InputError does so, too, unless there are
        checkpoints in it.

    Raises:
      InputError: when it cannot be written, another run is in it, or not all processes see the same folder there.
    """
    if not name and jax.process_count() > 1:
        raise InputError(f"{spell('workdir')}: several processes need a folder that all of them see; name one")
    path = pathlib.Path(name or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
    with contextlib.ExitStack() as until_taken_away, contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(made(path, keep))
            until_taken_away.enter_context(_held(path))
        processes.allgather_text()
        try:
            with tempfile.NamedTemporaryFile(dir=path, prefix=".process-") as mine:
                # All look for what each wrote, before any takes it away.
                names = processes.allgather_text(pathlib.Path(mine.name).name)
                missing = [process for process, name in enumerate(names) if not (path / name).exists()]
                if missing:
                    raise InputError(
                        f"{spell('workdir', path)}: process {jax.process_index()} and process {missing[0]} see "
                        "different folders there; name one that all see"
                    )
                processes.allgather_text()
        except OSError as error:
            raise _unwritable(path, error) from error
        processes.allgather_text()
        yield path


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a folder until the end of this one, however it ends."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of some network file systems, which lock no folders
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
def made(path: pathlib.Path, keep: bool = True) -> Iterator[pathlib.Path]:
    """The folder, made with those above it where there are none.

    Args:
      keep: False takes away at the end what was made here; an InputError does so, too, unless there are checkpoints.

    Raises:
      InputError: when it cannot be made.
    """
    created = list[pathlib.Path]()
    try:
        try:
            created = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                created = []  # or another run has made it meanwhile
                if not path.is_dir():
                    raise
        except OSError as error:
            raise _unwritable(path, error) from error
        yield path
    except InputError:
        keep = any(path.glob("checkpoints/*"))
        raise
    finally:
        if created and not keep:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run has come into it meanwhile
                for folder in created[1:]:
                    folder.rmdir()


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file, whole or not at all."""
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


def _unwritable(path: pathlib.Path, error: OSError) -> InputError:
    return InputError(f"{spell('workdir', path)}: cannot be written: {error.strerror}; name another folder")
