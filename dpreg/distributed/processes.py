"""The processes of a run: how they join, exchange text, and end when one of them is lost."""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed, xla_bridge  # without a public name: who is who, key-value store, Gloo
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import _jax

from dpreg.config.devices import check_processes, split_address
from dpreg.distributed import presence, watchdog
from dpreg.distributed.rendezvous import (
    HEARTBEAT_SECONDS,
    JOIN_SECONDS,
    Wait,
    is_loopback,
    join_rendezvous,
    log_line,
    serve_rendezvous,
)
from dpreg.errors import InputError, ProcessLost
from dpreg.spelling import spell

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

# The number of calls in flight besides the oldest one: enough that a device does not wait for the host, and few to
# finish when the run should stop. Simulated CPU devices deadlock if many calls are in flight.
CALLS_IN_FLIGHT = 2
MEET_SECONDS = 1800  # the limit for all processes to read their rows and compile
# Variables above 1 if a launcher has started several processes; JAX determines the rest by itself.
_CLUSTER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the run, if there are any, by JAX's coordination service.

    Args:
      address: HOST:PORT at which process 0 serves; "auto" asks the cluster; None does so where Slurm or
        Open MPI have started several processes.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.

    Raises:
      InputError: when one of the three is missing, two processes have the same id, the port is taken, or there is no
        cluster to ask.
      ProcessLost: when the others cannot be reached.
    """
    local_device_ids = None
    if address == "auto" or (address is None and _in_cluster()):
        address, num_processes, process_id, local_device_ids = _ask_cluster()
    check_processes(address, num_processes, process_id)
    if address is None or num_processes is None or process_id is None:
        return  # a single process
    _never_preempt()
    host, port = split_address(address)
    if process_id == 0:
        serve_rendezvous(host, port, num_processes)
    else:
        join_rendezvous(host, port, num_processes, process_id)
    _end_as_lost_when_aborted()
    if is_loopback(host):
        _keep_collectives_on(host)
    # dpreg handles SIGTERM: Orbax polls JAX's preemption service with its own step numbers, and would miss the signal.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        local_device_ids=local_device_ids,
        cluster_detection_method="deactivate",
        # The service has no authentication: a run on one machine listens on the loopback interface only.
        coordinator_bind_address=address if is_loopback(host) else None,
        initialization_timeout=3 * HEARTBEAT_SECONDS,  # all processes have just been connected
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _keep_collectives_on(host: str) -> None:
    """Makes the collectives of a run on one machine listen on loopback instead of the address of its host name."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # for GPUs
    if jax.config.values["jax_cpu_collectives_implementation"] != "gloo":
        return

    def make_client() -> Any:
        client = distributed.global_state.client
        return xla_bridge.make_cpu_client(_jax.make_gloo_tcp_collectives(client, hostname=host))

    xla_bridge.register_backend_factory("cpu", make_client, fail_quietly=False)


def _never_preempt() -> None:
    """On Linux, keeps this thread and those that it starts later from preempting another thread when they wake.

    Gloo's thread wakes while a sum is being sent, preempts the sending thread, and spins for a lock which that thread
    holds, for a time slice of 3 ms; the sum takes 0.2 ms.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):  # forbidden in some containers, where sums are slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _ask_cluster() -> tuple[str, int, int, list[int] | None]:
    """(address, number of processes, which this is, its devices), from Slurm, Open MPI, Kubernetes or a TPU pod."""
    address = count = process = devices = None
    reason = ""
    try:
        ask = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, count, process, devices = ask(None, None, None, None, None, JOIN_SECONDS)
    except (ValueError, RuntimeError, ImportError, OSError, KeyError) as error:
        reason = f" ({error})"
    if address is None or count is None or process is None:
        raise InputError(
            f"{spell('coordinator_address', 'auto')}: JAX finds no cluster to ask here{reason}; give HOST:PORT, "
            f"{spell('num_processes')} and {spell('process_id')}"
        )
    return address, count, process, None if devices is None else list(devices)


def coordinator() -> str | None:
    """HOST:PORT of the coordination service; None for a single process."""
    return distributed.global_state.coordinator_address if jax.process_count() > 1 else None


def _in_cluster() -> bool:
    sizes = (os.environ.get(name, "") for name in _CLUSTER_SIZES)
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _end_as_aborted(_: int) -> None:
    log_line(
        f"process {distributed.global_state.process_id} ends: its runtime lost another process, or failed, as it says "
        "above; start all again to go on from the newest checkpoint"
    )
    os._exit(ProcessLost.exit_code)


_ABORT_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_aborted = _ABORT_HANDLER(_end_as_aborted)  # referenced for the life of the process, since C does not own it


def _end_as_lost_when_aborted() -> None:
    """Turns SIGABRT, by which JAX's runtime ends a process when another one is lost, into exit code 76.

    A Python handler would run too late, because abort() ends the process as soon as the C handler has returned. The
    runtime's own callback for this case cannot be used from Python (std::bad_cast, jaxlib 0.10 and 0.12).
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _ABORT_HANDLER), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _aborted)


def end_as_lost(error: BaseException, exit_code: int = ProcessLost.exit_code) -> NoReturn:
    """Ends this process at once and logs why the run is lost; a normal exit would wait for the other processes.

    The reason is the one that the first process to end has reported, if it could.
    """
    reason = f"process {jax.process_index()}: {' '.join(str(error).split()) or type(error).__name__}"[:500]
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client = service()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has reported a reason already
            client.key_value_set("dpreg/lost", reason)
        reason = client.key_value_try_get("dpreg/lost")
    log_line(f"the run lost a process ({reason}); start all again to go on from the newest checkpoint")
    sys.stdout.flush()
    os._exit(exit_code)


_ERROR = "!"
_exchanges = itertools.count()


def service() -> Any:
    """The client of the coordination service."""
    return distributed.global_state.client


def allgather_text(
    text: str = "",
    error: str | None = None,
    patience: float = MEET_SECONDS,
    heartbeat: Callable[[], None] = lambda: None,
) -> list[str]:
    """Gathers a text from all processes, in the order of their ids. It is also a barrier.

    It uses the coordination service rather than the devices, so that it works before the first collective. All
    processes must call it equally often. It waits for a process while that is `presence.at_work`, and otherwise up to
    120 s since its last sign of life.

    Args:
      text: the text of this process.
      error: sent instead of the text if this process cannot continue; all processes then raise it.
      patience: the largest number of seconds to wait for the others.
      heartbeat: called every second of the wait.

    Raises:
      AgreedError: with the error of the first process that has one.
      ProcessLost: when another process does not call it in time.
    """
    mine = f":{text}" if error is None else _ERROR + error
    texts = [mine]
    if jax.process_count() > 1:
        meeting, wait = f"dpreg/exchange/{next(_exchanges)}", Wait(patience)
        service().key_value_set(f"{meeting}/{jax.process_index()}", mine)
        texts = [_awaited(f"{meeting}/{process}", process, wait, heartbeat) for process in range(jax.process_count())]
    for process, answer in enumerate(texts):
        if answer.startswith(_ERROR):
            where = f"process {process}: " if jax.process_count() > 1 else ""
            raise AgreedError(where + answer.removeprefix(_ERROR))
    return [answer.removeprefix(":") for answer in texts]


def _awaited(key: str, process: int, wait: Wait, heartbeat: Callable[[], None]) -> str:
    """Waits for the value that a process stores under a key."""
    signs = presence.Signs()
    while wait.goes_on(f"process {jax.process_index()} waits for {signs.describe(process)}"):
        try:
            text: str = service().blocking_key_value_get(key, 1000)
            return text
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            heartbeat()
            signs.look(process)
        if signs.silence(process) >= presence.SILENT_SECONDS:
            break
    raise ProcessLost(
        f"process {jax.process_index()} waited in vain for {signs.describe(process)}; see what that one says, and "
        "start all again"
    )


class AgreedError(InputError):
    """An InputError that all processes know of and raise."""


def on_all_processes(function: Callable[[], Result]) -> Result:
    """Runs a function in all processes; if one of them raises an InputError, all raise it at the next barrier.

    Raises:
      AgreedError: if a process has raised an InputError.
    """
    try:
        result = function()
        allgather_text()
        return result
    except AgreedError:
        raise
    except InputError as error:
        allgather_text(error=str(error))
        raise


def together(doing: str = "") -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a function that all processes call: an InputError of one is raised in all of them.

    Args:
      doing: the activity before its first collective, for the messages of processes that wait for this one.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def of_all(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not presence.is_one_of_several():
                return function(*args, **kwargs)
            with presence.at_work(doing) if doing else contextlib.nullcontext():
                return on_all_processes(functools.partial(function, *args, **kwargs))

        return of_all

    return decorate


def allgather_for(call: str, value: Any) -> list[Any]:
    """`allgather_text` of JSON values, within a call that all processes must be in.

    Raises:
      AgreedError: in all processes, when one of them is in another call.
    """
    found = []
    for text in allgather_text(json.dumps([call, value])):
        message = json.loads(text) if text.startswith("[") else []
        found.append(message if len(message) == 2 else ["another function", None])
    for process, (other, _) in enumerate(found):
        if other != found[0][0]:
            raise AgreedError(
                f"process 0 calls {found[0][0]} and process {process} calls {other}; let all processes call the same"
            )
    return [value for _, value in found]


def require_alike(call: str, advice: str, given: Callable[[], Mapping[str, tuple[str, str]]]) -> None:
    """Compares the arguments of a call between processes, before its first collective.

    Args:
      call: the name of the call.
      advice: what the user should do if something differs.
      given: returns for each name what a message shows, and a digest of the value; not called in a single process.

    Raises:
      AgreedError: in all processes, when something differs between two of them.
    """
    if not presence.is_one_of_several():
        return
    with presence.at_work("reading what it was given"):
        own = given()
    first, *others = allgather_for(call, own)
    for process, other in enumerate(others, 1):
        for name in {**first, **other}:
            if other.get(name) != first.get(name):
                here, there = (values.get(name, ["none"])[0] for values in (first, other))
                found = f"{here} and {there}" if here != there else f"both {here}, with other values"
                raise AgreedError(f"{call}: processes 0 and {process} have different {name}: {found}; {advice}")


@functools.cache
def _compile_sum(size: int) -> tuple[Any, NamedSharding]:
    """The compiled sum of [size] uint32 over processes, and the sharding of its argument [processes, size]."""
    of_each = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([of_each[process] for process in range(jax.process_count())]), ("process",))
    along, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("process",), ()))
    words = jax.ShapeDtypeStruct((mesh.size, size), np.uint32, sharding=along)
    summed = jax.jit(lambda of_all: of_all.sum(axis=0, dtype=np.uint32), out_shardings=everywhere)
    with presence.at_work("compiling"):
        compiled = summed.lower(words).compile()
    allgather_text()  # barrier: the first collective would time out
    return compiled, along


def sum_words(words: np.ndarray) -> np.ndarray:
    """The sum of [n] uint32 over all processes, by a collective over one device of each process."""
    size = 1 << max(10, (len(words) - 1).bit_length())  # few sizes, since each is compiled
    compiled, along = _compile_sum(size)
    padded = np.zeros((1, size), np.uint32)
    padded[0, : len(words)] = words
    presence.begin_call()
    with watchdog.watched():
        of_all = jax.make_array_from_callback((jax.process_count(), size), along, lambda _: padded)
        return np.asarray(compiled(of_all))[: len(words)]
