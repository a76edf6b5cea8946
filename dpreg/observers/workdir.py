"""The folder of a run's outputs, the same for all its processes."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

import jax

from dpreg.errors import InputError
from dpreg.parallel import processes


@contextlib.contextmanager
def open_workdir(name: str | None, keep: bool = True) -> Iterator[pathlib.Path]:
    """The folder, made where there is none, and checked before anything costly.

    Args:
      name: None for a new folder in runs/, named by the time.
      keep: False takes the folder away at the end, if it was made here; an InputError does so, too.

    Raises:
      InputError: when it cannot be written, or not all processes see the same folder there.
    """
    if not name and jax.process_count() > 1:
        raise InputError("--workdir: several processes need a folder that all see; give --workdir=DIR")
    path = pathlib.Path(name or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(made(path, keep))
        processes.exchange()
        try:
            with tempfile.NamedTemporaryFile(dir=path, prefix=".process-") as mine:
                # All look for what each wrote, before any takes it away.
                names = processes.exchange(pathlib.Path(mine.name).name)
                missing = [process for process, name in enumerate(names) if not (path / name).exists()]
                if missing:
                    raise InputError(
                        f"--workdir={path}: process {jax.process_index()} and process {missing[0]} see different "
                        "folders there; name one that all see"
                    )
                processes.exchange()
        except OSError as error:
            raise _unwritable(path, error) from error
        processes.exchange()
        yield path


@contextlib.contextmanager
def made(path: pathlib.Path, keep: bool = True) -> Iterator[pathlib.Path]:
    """The folder, made with those above it where there are none.

    Args:
      keep: False takes away at the end what was made here; an InputError does so, too.

    Raises:
      InputError: when it cannot be made.
    """
    created = list[pathlib.Path]()
    try:
        try:
            created = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        yield path
    except InputError:
        keep = False
        raise
    finally:
        if created and not keep:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run has come into it meanwhile
                for folder in created[1:]:
                    folder.rmdir()


def _unwritable(path: pathlib.Path, error: OSError) -> InputError:
    return InputError(f"--workdir={path}: cannot be written: {error.strerror}; name another folder")
