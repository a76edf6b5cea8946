"""All decisions that depend on the platform and are made for the speed of a step.

They change its result by rounding at most. Those that affect rounding do not depend on the number of devices if the
reduction has `same_bits`.
"""

import enum
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dpreg.distributed import devices
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.mlp import LinearRegression
from dpreg.step.layout import BatchLayout
from dpreg.step.reduce import Reduction
from dpreg.step.state import Model, TrainState, all_are_vectors

# CPU: a step processes its rows in chunks that fit into a cache, so that the backward pass finds there what the forward
# pass has read: the cache of one core, or the last-level cache if several cores share an operation, as XLA does for
# large operations only.
_CHUNK_BYTES_ONE_CORE, _CHUNK_BYTES_SHARED, _LARGE_SHARD_BYTES = 5 << 16, 5 << 20, 5 << 18

# CPU: a loop compiled as one function is up to twice as fast if its operations are small. Otherwise each operation is
# dispatched, which takes 60 ns, and may be shared by cores. The bits of the two differ.
_WHOLE_LOOPS = "small-while-loop-hoisting"
_MOST_FACTORS_OF_WHOLE_LOOPS = 9 << 9

# GPU: loops become CUDA graphs, and GEMM algorithms are chosen by rule: autotuned, processes would choose differently.
_GPU_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_autotune_level": "0",
}

# FLOPs of one compiled call, about a second of a CPU and of the slowest chips: signals, checkpoints and progress are
# handled only between calls. On a chip, a shard that is computed by itself takes at least as long as the last of these.
_OPERATIONS_OF_CALL, _OPERATIONS_OF_CALL_OF_CHIP, _LEAST_OPERATIONS_OF_SHARD = 1 << 36, 1 << 41, 1 << 26

# Only multi-device programs get CSE before the first algebraic simplification, which rewrites x / s to x * (1 / s) if s
# has one user. Without CSE, one-device programs are simplified alike.
_CSE = "cse"


class Traversal(enum.Enum):
    """The order in which a device processes its rows of a step."""

    ROWS = "all rows at once or in chunks, whatever their shards: for row-wise models"
    SHARDS_TOGETHER = "all shards at once, by vmap"
    SHARD_BY_SHARD = "one shard after the other"


class Schedule(NamedTuple):
    """How a step is computed on a device, which changes its result by rounding at most.

    Attributes:
      traversal: the order of the rows; under `ordered`, SHARD_BY_SHARD.
      num_chunks: the number of equal chunks whose sums are accumulated, a multiple of the run's accumulate_steps. It
        divides the rows that are processed together: those of the device with Traversal.ROWS, otherwise of a shard.
      row_wise: whether the model treats each row by itself, see `is_row_wise`.
      whole_loops: whether XLA:CPU compiles a loop as one function.
    """

    traversal: Traversal
    num_chunks: int
    row_wise: bool
    whole_loops: bool = False


def schedule_for(
    model: Model,
    state: TrainState,
    layout: BatchLayout,
    mesh: Mesh,
    accumulate_steps: int,
    reduction: Reduction,
    sync_batch_norm: bool,
) -> Schedule:
    """The fastest known schedule for a platform.

    It is the same in all processes, and under `ordered` the same on any number of devices.
    """
    row_wise = is_row_wise(model, state)
    traversal = Traversal.ROWS if row_wise else Traversal.SHARDS_TOGETHER
    if reduction.shard_by_shard:
        traversal = Traversal.SHARD_BY_SHARD
    if mesh.devices.flat[0].platform != "cpu":
        return Schedule(traversal, accumulate_steps, row_wise)
    rows = layout.shard_batch // accumulate_steps  # processed together; the chunks divide them
    if not reduction.shard_by_shard:
        rows *= layout.slots
    if reduction.same_bits:
        # An operation that cores share has the same bits as on one core, except for matrix-matrix products.
        by_cores = multiplies_vectors_only(model, state) and rows * layout.row_bytes > _CHUNK_BYTES_ONE_CORE
    else:
        by_cores = devices.have_several_cores(mesh)
    if not row_wise:
        large = _CHUNK_BYTES_SHARED if by_cores else _LARGE_SHARD_BYTES
        if not sync_batch_norm and rows * layout.row_bytes > large:
            traversal = Traversal.SHARD_BY_SHARD
        return Schedule(traversal, accumulate_steps, row_wise)
    width = max(layout.row_bytes // 4, sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    chunk_bytes = _CHUNK_BYTES_SHARED if by_cores else _CHUNK_BYTES_ONE_CORE
    return Schedule(
        traversal,
        accumulate_steps * fewest_chunks(rows, chunk_bytes // layout.row_bytes),
        row_wise,
        whole_loops=not by_cores or rows * width <= _MOST_FACTORS_OF_WHOLE_LOOPS,
    )


def steps_of_call(platform: str, operations: int, shards: int) -> int:
    """The largest number of steps of one compiled call.

    Args:
      operations: FLOPs of a step.
      shards: the number of shards that a device computes one after the other; 0 if it computes all of them together.
    """
    if platform == "cpu":
        return max(1, _OPERATIONS_OF_CALL // operations)
    return max(1, _OPERATIONS_OF_CALL_OF_CHIP // max(operations, shards * _LEAST_OPERATIONS_OF_SHARD))


def compiler_options(reduction: Reduction, platform: str, whole_loops: bool = False) -> dict[str, str]:
    """The compiler options of a platform, above all the passes to disable."""
    disabled = [_CSE] if reduction.same_bits else []
    if platform == "cpu" and not (whole_loops and devices.makes_whole_loops()):
        disabled.append(_WHOLE_LOOPS)
    options = {"xla_disable_hlo_passes": ",".join(disabled)} if disabled else {}
    if platform == "gpu":
        options |= {name: value for name, value in _GPU_OPTIONS.items() if not devices.in_xla_flags(name)}
    return options


def known_class(model: Model) -> type[Any]:
    """The class that defines a model's computation: its own, or the `same_as` that it was found to be equal to."""
    known: type[Any] = getattr(model, "same_as", type(model))
    return known


def is_row_wise(model: Model, state: TrainState) -> bool:
    """Whether a model declares that it treats each row independently, and its gradient is small."""
    known = known_class(model)
    owner = next((base for base in known.__mro__ if "row_wise" in vars(base)), None)
    declared = owner is not None and vars(owner)["row_wise"] and known.__call__ is owner.__call__
    gradient_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    return declared and gradient_bytes * 4 <= _CHUNK_BYTES_ONE_CORE


def multiplies_vectors_only(model: Model, state: TrainState) -> bool:
    """Whether all products of a model are known to be matrix-vector products."""
    linear = known_class(model).__call__ in (LinearRegressionScratch.__call__, LinearRegression.__call__)
    return linear and all_are_vectors(state.params)


def fewest_chunks(rows: int, most: int) -> int:
    """The least number of equal chunks of at most `most` rows each; 1 if that would take many more chunks."""
    fewest = -(-rows // max(most, 1))
    return next((chunks for chunks in range(fewest, 2 * fewest + 1) if rows % chunks == 0), 1)
