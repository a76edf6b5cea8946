"""The exact solution of linear regression over all shards, devices and processes."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpreg.data.order import Sampler
from dpreg.data.sources import Source
from dpreg.models.least_squares import Triangle

_BLOCK_VALUES = 1 << 21  # decomposed at once


def triangle_of(source: Source, mesh: Mesh, num_shards: int, heartbeat: Callable[[], None] = lambda: None) -> Triangle:
    """What all rows of a source come to, to the same bits on any number of devices and processes.

    Each process reads the rows of the logical shards that its devices carry, once, and decomposes them on the host in
    float64, which accelerators have not or hardly; the triangles of the shards meet, and are put together by a fixed
    tree. All processes have to call it.

    Args:
      heartbeat: called whenever some rows are done.
    """
    one = source[np.zeros(1, np.int32)]
    size = 1 + one["x"].shape[1] + one["y"].shape[1]
    sampler = Sampler(len(source), num_shards, num_shards, shuffle=False)
    slots = -(-num_shards // mesh.size)
    shards = np.arange(mesh.size * slots).reshape(mesh.size, slots)
    mine = shards[[device.process_index == jax.process_index() for device in mesh.devices.flat]]
    own = np.zeros((*mine.shape, size * size + 2))
    for place, shard in np.ndenumerate(mine):
        start, rows = sampler.shard_start(int(shard)), int(sampler.shard_size(int(shard)))
        at_once = max(size, _BLOCK_VALUES // size)
        total: Triangle | None = None
        for first in range(start, start + rows, at_once):
            block = source[np.arange(first, min(first + at_once, start + rows))]
            part = Triangle.of(block["x"], block["y"], block["weight"])
            total = part if total is None else total + part
            heartbeat()
        if total is not None:
            own[place] = [*total.r.ravel(), total.rows, total.weight]
    # As words: JAX would make float32 of them.
    words = multihost_utils.process_allgather(own.view(np.uint32), tiled=True)
    every = np.ascontiguousarray(words).view(np.float64).reshape(-1, size * size + 2)[:num_shards]
    triangles = [
        Triangle(part[:-2].reshape(size, size), one["x"].shape[1], int(part[-2]), float(part[-1])) for part in every
    ]
    while len(triangles) > 1:
        pairs = range(0, len(triangles), 2)
        triangles = [sum(triangles[i + 1 : i + 2], triangles[i]) for i in pairs]
    return triangles[0]
