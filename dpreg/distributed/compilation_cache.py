"""JAX's persistent compilation cache in a folder of dpreg, with a checksum for each entry."""

import hashlib
import logging
from typing import Any

import jax
from jax._src import compilation_cache, lru_cache  # JAX has no public way to choose the kind of cache

_DIGEST_BYTES = 16


class _CheckedCache(lru_cache.LRUCache):
    """A cache that deletes incomplete entries when they are read, so that they are written again.

    JAX writes entries in place. It warns of a truncated entry at every start, and never replaces it.
    """

    _warned = False

    def get(self, key: str) -> bytes | None:
        """The entry; None if it is missing, incomplete or unreadable."""
        try:
            entry: bytes | None = super().get(key)
            if entry is None:
                return None
            value, digest = entry[:-_DIGEST_BYTES], entry[-_DIGEST_BYTES:]
            if digest == _digest(value):
                return value
            self._delete(key)
        except OSError:
            pass
        return None

    def put(self, key: str, value: bytes) -> None:
        """Adds an entry; warns once if this fails."""
        try:
            super().put(key, value + _digest(value))
        except OSError as error:
            self._delete(key)
            if not self._warned:
                logging.warning("%s: compiled programs cannot be kept: %s", self.path, error.strerror)
            self._warned = True

    def _delete(self, key: str) -> None:
        (self.path / f"{key}{lru_cache._CACHE_SUFFIX}").unlink(missing_ok=True)


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_DIGEST_BYTES).digest()


def use(folder: str) -> None:
    """Stores all compiled programs in a folder, even those that compile quickly. Call it before JAX compiles any."""
    before = compilation_cache.get_file_cache

    def get_file_cache(path: str) -> Any:
        if path != folder:
            return before(path)
        return _CheckedCache(path, max_size=jax.config.values["jax_compilation_cache_max_size"]), path

    compilation_cache.get_file_cache = get_file_cache
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
