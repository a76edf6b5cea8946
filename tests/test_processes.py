"""Several processes: the same bits as one process, and recovery when any of them is lost."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import types

import forked
import jax
import psutil
import pytest
from cluster import (
    ROOT,
    WORK,
    alone,
    complete,
    end,
    ended,
    free_address,
    has_logged_steps,
    outcome,
    run_processes,
    several,
    start,
    wait_until,
    workers,
)

from dpreg.distributed import devices, presence, processes, rendezvous
from dpreg.distributed.watchdog import Watchdog
from dpreg.errors import InputError, ProcessLost

MAIN = ("-m", "dpreg.main")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    alone(workdir)
    return outcome(workdir)


@pytest.mark.parametrize(("count", "flags"), [(4, ()), (2, ("--backend=pmap", "--placement=host"))])
def test_several_processes_give_the_bits_of_one_process(tmp_path, expected, count, flags):
    (_, lines, *_), *_ = several(count, tmp_path, *flags)
    assert any(f"8 cpu devices of {count} processes" in line for line in lines), lines
    assert outcome(tmp_path) == expected
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["process_count"], summary["device_count"]) == (count, 8)


@pytest.mark.parametrize(
    "flags",
    [
        ("--num_train=19200", "--max_epochs=1"),  # 600 steps: one block in one process, three in two.
        ("--num_train=3200", "--max_epochs=7", "--num_val=0"),  # Blocks of 5 and 2 epochs of 100 steps.
    ],
)
def test_different_block_lengths_in_one_and_two_processes_change_no_bit(tmp_path, flags):
    several(2, tmp_path / "two", *flags)
    alone(tmp_path / "one", *flags)
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


def test_pmean_in_two_processes_agrees_up_to_rounding(tmp_path, expected):
    several(2, tmp_path, "--reduction=pmean")
    (_, two, *_), (_, one, *_) = outcome(tmp_path), expected
    for ours, theirs in zip(two, one, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours.get("audit") == theirs.get("audit")


MEANS = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from dpreg.distributed import devices
from dpreg.planning import programs
from dpreg.distributed.devices import AXIS
from dpreg.step.reduce import mean_over_devices

devices.start("cpu", 2, sys.argv[1].partition("=")[2], 2, int(sys.argv[2]))
mesh = devices.data_mesh(jax.device_count())

def means(size):
    mine = jax.lax.axis_index(AXIS).astype(jnp.float32)
    return mean_over_devices({"a": mine * jnp.ones((size - 1,)), "b": (mine - 7)[None]}, mesh)

for size in map(int, sys.argv[3:]):
    mapped = jax.shard_map(lambda: means(size), mesh=mesh, in_specs=(), out_specs=PartitionSpec(), check_vma=False)
    compiled = jax.jit(mapped).lower().compile()
    found, (one,) = compiled(), programs.find_collectives(compiled, mesh.size)
    print(one.kind, one.size, set(found["a"].tolist()), found["b"].tolist())
"""


def test_processes_average_small_arrays_by_all_to_all_and_large_ones_by_all_reduce():
    few, many = 1 << 14, (1 << 14) + 1  # The limit is 256 KB in total for 4 devices.
    address = free_address()
    results = run_processes(*((("-c", MEANS, address, str(i), str(few), str(many)), (), ROOT) for i in range(2)))
    for code, lines, out, _ in results:
        assert code == 0, lines
        means = "{1.5} [-5.5]"  # The means of 0, 1, 2, 3 are exact in any order.
        collectives = re.findall(r"all-.* \{.*", out)  # Gloo writes to stdout, too, and not always whole lines.
        assert collectives == [f"all-to-all {4 * 4 * few} {means}", f"all-reduce {4 * many} {means}"]


CORES = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[3:]))
import numpy as np, psutil
from jax.experimental import multihost_utils
from dpreg.distributed import devices, processes

devices.start("cpu", 1, sys.argv[1].partition("=")[2], 2, int(sys.argv[2]))
print("several", devices.have_several_cores(devices.data_mesh(2)))
multihost_utils.process_allgather(np.ones(2, np.float32))
sockets = [s for s in psutil.Process().net_connections() if s.status == psutil.CONN_LISTEN]
print("listens at", {s.laddr.ip.removeprefix("::ffff:") for s in sockets})
processes.allgather_text()
"""


@pytest.fixture
def with_real_address(tmp_path):
    """Returns a command prefix that makes the host name resolve to an address that other hosts can reach."""
    hosts = tmp_path / "hosts"
    own = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    real = [address for address in own if not rendezvous.is_loopback(address)]
    prefix = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
    if real and shutil.which("unshare"):
        hosts.write_text(f"127.0.0.1 localhost\n{real[0]} {socket.gethostname()}\n")
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return []  # Not root, or no network: the host name may resolve to a loopback address.


@pytest.mark.skipif(devices.cores() < 2, reason="one core")
@pytest.mark.parametrize(("second", "several"), [([0, 1], True), ([0], False)])
def test_processes_agree_on_cores_per_device_and_listen_only_on_the_loopback(second, several, with_real_address):
    """Otherwise they would compile programs with different bits, or accept connections of other hosts."""
    cores, address = sorted(os.sched_getaffinity(0)), free_address()
    cores_of_process = [[str(cores[core]) for core in core_numbers] for core_numbers in ([0, 1], second)]
    for code, lines, out, _ in run_processes(
        *((("-c", CORES, address, str(i), *core_numbers), (), ROOT) for i, core_numbers in enumerate(cores_of_process)),
        prefix=with_real_address,
    ):
        assert code == 0, lines
        assert f"several {several}" in out
        assert "listens at {'127.0.0.1'}" in out


def test_the_reason_why_jax_does_not_start_is_reported(monkeypatch):
    def none():
        raise RuntimeError("no address\nfor this host")

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.raises(InputError, match=r"^JAX does not start: no address for this host$"):
        devices.start("cpu")


def test_a_process_waits_for_another_while_that_one_sends_heartbeats(monkeypatch, capfd):
    """While `allgather_text` waits it calls its heartbeat every second; at last it returns the texts."""
    late, signs, now = [], [], [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])

    class Service:
        def key_value_set(self, key, value):
            self.mine = value

        def blocking_key_value_get(self, key, milliseconds):
            if key.endswith("/0"):
                return self.mine
            if late:
                now[0] += 1
                raise late.pop()
            return ":theirs"

        def key_value_try_get(self, key):
            if signs:
                return signs.pop(0)
            raise jax.errors.JaxRuntimeError("NOT_FOUND")

    service, beats = Service(), []
    monkeypatch.setattr(processes, "service", lambda: service)
    monkeypatch.setattr(presence, "_client", lambda: service)
    monkeypatch.setattr(presence, "time", clock)
    monkeypatch.setattr(rendezvous, "time", clock)
    monkeypatch.setattr(presence, "SILENT_SECONDS", 3.5)
    monkeypatch.setattr(rendezvous, "_REPORT_SECONDS", 2.5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    late += [jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: key not found")] * 6
    signs += [f"0 {beat} compiling" for beat in range(6)]
    assert processes.allgather_text("mine", heartbeat=lambda: beats.append(1)) == ["mine", "theirs"]
    assert len(beats) == 6
    assert "process 0 waits for process 1, which is compiling" in capfd.readouterr().err
    late += [jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: key not found")] * 6
    signs += ["0 9 compiling"] * 6
    with pytest.raises(ProcessLost, match=r"in vain for process 1, without a sign of life for 4 s of 3\.5 s; see"):
        processes.allgather_text("mine")


LOST = """
import sys, time
import numpy as np
import dpreg
from dpreg.distributed import watchdog, presence

presence.SILENT_SECONDS, watchdog._REPORT_SECONDS = 6.0, 2.0
dpreg.start("cpu", 1, sys.argv[1].partition("=")[2], 2, int(sys.argv[2]))
if sys.argv[3] == "before":
    time.sleep(1000)
x = np.arange(64.0)
class Hangs(dpreg.Callback):
    def on_steps(self, progress):
        time.sleep(1000)
callbacks = [Hangs()] if sys.argv[3] == "while training" else []
rows = dpreg.ArraySource(x, x)
trainer = dpreg.Trainer(9, num_shards=2, callbacks=callbacks)
trainer.fit(dpreg.LinearRegressionScratch(1, 1e-4), dpreg.RegressionData(rows, rows))
"""


@pytest.mark.faults
@pytest.mark.parametrize("where", ["before", "while training"])
def test_a_program_that_misses_another_process_exits_with_76_and_names_it(where):
    """This is a Python program of the user, which has no other watchdog."""
    address = free_address()
    results = run_processes(*((("-c", LOST, address, str(i), where if i else "nowhere"), (), ROOT) for i in range(2)))
    (code, lines, *_), (other, *_) = results  # Both end within the timeout of `run_processes`.
    output = "\n".join(lines)
    assert (code, other) == (76, 76), output
    assert "process 1, without a sign of life for" in output
    if where == "before":
        assert "ProcessLost: process 0 waited in vain for process 1" in output
    else:
        assert "process 0 has no new result for" in output
        assert "in fetch_in_order" in output  # The stacks are printed.


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_run_that_loses_a_process_restarts_and_ends_with_the_same_result(tmp_path, expected, victim, how):
    # Only the first attempt starts from scratch.
    launcher = start(2, tmp_path, "--checkpoint_every_steps=50", "--resume=never", restarts=1)
    wait_until(lambda: complete(tmp_path), launcher)
    time.sleep(random.Random(victim).random())
    workers(launcher)[victim].send_signal(how)
    code, output = ended(launcher)
    assert code == 0, output
    assert "starting again" in output
    assert "going on from step" in output
    assert outcome(tmp_path) == expected


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "how"), [(2, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_without_a_launcher_the_other_processes_exit_with_76_within_15_seconds(tmp_path, victim, how):
    flags = (*WORK, "--max_epochs=10000", "--num_devices=2", free_address(), f"--workdir={tmp_path}")
    running = [forked.start(*MAIN, *flags, "--num_processes=3", f"--process_id={i}") for i in range(3)]
    try:
        wait_until(lambda: has_logged_steps(tmp_path), running[0])
        running[victim].send_signal(how)
        sent = time.monotonic()
        for number in {0, 1, 2} - {victim}:
            output = running[number].communicate(timeout=60)[1]
            assert running[number].returncode == 76, output
            assert time.monotonic() - sent < 15
            assert "start all again to go on from the newest checkpoint" in output
    finally:
        end(running)


# Blocks of 256 steps, not all of them in flight at once; epochs of 2,560 steps without a wait between them.
LONG = (
    "--platform=cpu",
    "--reduction=ordered",
    "--batch_size=160",
    "--num_train=409600",
    "--num_val=0",
    "--lr=0.001",
)


@pytest.mark.faults
def test_sigterm_to_one_process_makes_all_save_within_an_epoch_and_exit_with_75(tmp_path):
    epochs = "--max_epochs=30"
    often = ("--checkpoint_every_seconds=0.1", "--keep=1000")
    launcher = start(2, tmp_path / "w", epochs, *often, devices=1, work=LONG)
    wait_until(lambda: complete(tmp_path / "w"), launcher)
    workers(launcher)[1].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    for worker in workers(launcher):  # A second SIGTERM does no harm.
        worker.send_signal(signal.SIGTERM)
    code, output = ended(launcher)
    assert code == 75, output
    assert output.count("the same command resumes from there") == 2
    stopped_at = max(complete(tmp_path / "w"))
    assert f"stopped at step {stopped_at:,}," in output
    assert any(step % 2560 for step in complete(tmp_path / "w")), "none was saved within an epoch"
    for name in ("w", "whole"):
        done = alone(tmp_path / name, epochs, devices=1, work=LONG)
        assert (f"going on from step {stopped_at:,}" in done.stderr) == (name == "w"), done.stderr
    assert outcome(tmp_path / "w") == outcome(tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.parametrize(("how", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_launcher_restarts_no_process(tmp_path, how, exit_code):
    launcher = start(
        2, tmp_path, "--checkpoint_every_seconds=0.3", "--max_epochs=10000", devices=1, restarts=3, work=LONG
    )
    wait_until(lambda: complete(tmp_path), launcher)
    # Ctrl-C in a terminal reaches all of them.
    for process in (*workers(launcher), launcher) if how == signal.SIGINT else (launcher,):
        process.send_signal(how)
    code, output = ended(launcher)
    assert code == exit_code, output
    assert output.count("which is saved") == 2
    assert "starting again" not in output


@pytest.mark.faults
def test_a_run_stopped_in_two_processes_resumes_in_any_number(tmp_path, expected):
    launcher = start(2, tmp_path / "w", "--checkpoint_every_steps=20")
    wait_until(lambda: complete(tmp_path / "w"), launcher)
    workers(launcher)[0].send_signal(signal.SIGTERM)
    code, output = ended(launcher)
    assert code == 75, output
    for count, each in ((1, 2), (4, 1)):
        workdir = tmp_path / f"{count}x{each}"
        shutil.copytree(tmp_path / "w", workdir)
        if count == 1:
            output = alone(workdir, devices=each).stderr
        else:
            code, output = ended(start(count, workdir, devices=each))
            assert code == 0, output
        assert "going on from step" in output
        assert outcome(workdir) == expected


def command_with_fault(number, fault, *flags):
    """Returns the start of a process whose validation runs `fault` instead."""
    code = (
        f"import time; from dpreg.train.loop import Loop; Loop.validate = lambda self: {fault}; "
        "from dpreg.main import main; main()"
    )
    command = ("-c", code) if fault else MAIN
    return command, [*flags, "--num_processes=2", f"--process_id={number}"], ROOT


@pytest.mark.faults
@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_in_one_process_ends_all_with_76_and_the_reason(tmp_path, who):
    flags = ("--platform=cpu", "--num_devices=2", free_address(), f"--workdir={tmp_path}")
    faults = ["", ""]
    faults[who] = "int('boom')"
    results = run_processes(*(command_with_fault(i, fault, *flags) for i, fault in enumerate(faults)))
    for code, lines, _, _ in results:
        assert code == 76, lines
        assert any("the run lost a process" in line or "lost another process" in line for line in lines), lines
    assert "boom" in "".join(results[who][1])
    assert results[1][3] - results[0][3] < 15


@pytest.mark.faults
def test_a_hanging_process_is_ended_and_prints_its_stacks(tmp_path):
    """The heartbeats of the process go on: only the watchdog detects the hang."""
    flags = ("--platform=cpu", "--num_devices=2", free_address(), f"--workdir={tmp_path}", "--step_timeout=4")
    results = run_processes(command_with_fault(0, "", *flags), command_with_fault(1, "time.sleep(1000)", *flags))
    assert [code for code, *_ in results] == [76, 76]
    output = "\n".join(results[1][1])
    assert "had no result for 4 s (--step_timeout)" in output
    assert "in validate" in output or "in <lambda>" in output


def test_the_watchdog_limit_grows_with_the_slowest_wait_and_can_be_disabled(monkeypatch):
    watchdog = Watchdog()
    assert watchdog.limit == 600  # Nothing is measured yet.
    watchdog.begin()
    watchdog.progress()
    assert watchdog.limit == 120
    watchdog._waited = 30.0
    watchdog.progress()
    assert watchdog.limit == 600
    for _ in range(30):
        watchdog.progress()
    assert watchdog.limit == 120
    assert Watchdog(7.0).limit == 7
    ends, ticks = [], itertools.count(1)
    brisk = Watchdog(0.6)  # 4 ticks
    brisk._end = ends.append

    def tick(seconds):
        """Results come with every third tick up to the 60th; the watchdog must fire at the 65th, one tick too late."""
        now = next(ticks)
        if now % 3 == 0 and now <= 60:
            brisk.progress()
        assert bool(ends) == (now >= 65)
        return now >= 65

    monkeypatch.setattr(brisk._over, "wait", tick)
    brisk.begin()
    brisk._watch()
    assert ends == ["0.6 s (step_timeout): it, a file system or another process hangs"]
    for some, message in (
        ((None, 2, 0), "give all three"),
        (("127.0.0.1:1", 2, None), "give all three"),
        (("127.0.0.1:1", 2, 2), "use 0 to 1"),
        (("127.0.0.1", 2, 0), "give the host and the port"),
    ):
        with pytest.raises(InputError, match=message):
            processes.join(*some)
    with Watchdog(0.0) as never:
        assert not never._thread.is_alive()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["--lr=0.1"], [], "--lr is 0.1 in process 0 and 0.03 in process 1"),
        (["--num_shards=1", "--batch_size=4"], ["--num_shards=1", "--batch_size=4"], "in each of 2 processes"),
        (["--batch_size=30"], ["--batch_size=30"], "use --batch_size=24 or 32"),
        ([], ["--workdir={}/other"], "see different folders"),
        ([], ["--num_processes=3"], "--num_processes is 2 in process 0 and 3 in process 1"),
    ],
)
def test_bad_settings_of_several_processes_are_refused_in_one_line_in_each(tmp_path, first, second, message):
    (tmp_path / "other").mkdir()
    common = ("--platform=cpu", "--num_devices=1", free_address(), "--num_processes=2", f"--workdir={tmp_path / 'w'}")
    starts = [
        (MAIN, [*common, f"--process_id={i}", *(flag.format(tmp_path) for flag in own)], ROOT)
        for i, own in enumerate((first, second))
    ]
    for code, lines, _, _ in run_processes(*starts):
        assert (code, len(lines)) == (2, 1), lines
        assert message in lines[0]
    assert not (tmp_path / "w").exists()


def rendezvous_results(port, *others, num_processes=3):
    """Runs a rendezvous and returns the error of each process, or None if it succeeds."""
    results = {}

    def run(name, function, *arguments):
        try:
            results[name] = function("127.0.0.1", port, *arguments)
        except (InputError, ProcessLost) as error:
            results[name] = error

    threads = [threading.Thread(target=run, args=(-1, rendezvous.serve_rendezvous, num_processes))]
    for name, (process, claimed) in enumerate(others):
        threads.append(threading.Thread(target=run, args=(name, rendezvous.join_rendezvous, claimed, process)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[name] for name in range(-1, len(others))]


def test_the_rendezvous_reports_errors_to_all_processes(monkeypatch, capfd):
    port = int(free_address().rpartition(":")[2])
    assert rendezvous_results(port, (1, 3), (2, 3)) == [None, None, None]
    for error in rendezvous_results(port, (1, 3), (1, 3)):
        assert isinstance(error, InputError)
        assert "process_id=1: two processes have it" in str(error)
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 2)
    zero, one = rendezvous_results(port, (1, 3))
    assert isinstance(zero, ProcessLost)
    assert "process 2 did not come to process 0 at 127.0.0.1" in str(zero)
    assert str(one) == str(zero)
    with pytest.raises(ProcessLost, match=r"process 1 found no process 0 at 127\.0\.0\.1:.*Connection refused"):
        rendezvous.join_rendezvous("127.0.0.1", port, 2, 1)


def test_a_process_0_that_stops_during_the_rendezvous_is_detected(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ProcessLost, match=r"found no process 0 .*it says nothing for 0\.5 s"):
            rendezvous.join_rendezvous("127.0.0.1", port, 2, 1)
    with (
        server_sending(b'{"missing": [2]}\n') as port,
        pytest.raises(ProcessLost, match=r"says nothing for 0.5 s: it is stuck"),
    ):
        rendezvous.join_rendezvous("127.0.0.1", port, 3, 1)


@contextlib.contextmanager
def server_sending(payload):
    """Yields the port of a server that sends the payload to each connection, and then nothing."""
    held = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                held.append(listener.accept()[0])
                held[-1].sendall(payload)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in held:
        connection.close()


FOREIGN_MESSAGES = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"[" * 100_000 + b"\n",
    b"[" * 60 + b"\n",
    b'{"process_id": 1e999, "num_processes": 3}\n',
    b'{"process_id": 1, "num_processes": NaN}\n',
    b'{"process_id": true, "num_processes": 3}\n',
    b'{"process_id": -1, "num_processes": 3}\n',
    b'{"process_id": 0, "num_processes": 3}\n',
    b'{"process_id": 3, "num_processes": 3}\n',
    b'{"process_id": 1}\n',
    b'{"process_id": 1, "num_processes": 3, "more": {}}\n',
    b'{"process_id": 1, "num_processes": 3}\n' * 2,
    b'"process_id"\n',
    b"7\n",
    b"\n",
    b"\xff\xfe\x00\n",
    b"x" * 1_000_000,
    b"",
)


def connected(port):
    """Waits until process 0 listens, and returns a connection to it."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_foreign_connections_to_the_port_cost_a_run_only_one_log_line(monkeypatch, capfd):
    """Before the processes connect: malformed messages, twelve silent connections, and one that sends byte by byte."""
    port, results = int(free_address().rpartition(":")[2]), []
    monkeypatch.setattr(rendezvous, "_MOST_UNKNOWN", 20)
    # A rendezvous that waits for silent connections would not end.
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 1000)
    zero = threading.Thread(target=lambda: results.append(rendezvous.serve_rendezvous("127.0.0.1", port, 3)))
    zero.start()

    silent, over = [connected(port) for _ in range(12)], threading.Event()

    def drip(connection):
        with contextlib.suppress(OSError), connection:
            while not over.wait(0.05):
                connection.sendall(b" ")

    dripping = threading.Thread(target=drip, args=(connected(port),))
    dripping.start()
    for payload in FOREIGN_MESSAGES:
        with contextlib.suppress(OSError), connected(port) as connection:  # Process 0 may close it before all is sent.
            connection.sendall(payload)
    with connected(port) as connection:  # A process of this run, which dies and is restarted below.
        connection.sendall(b'{"process_id": 1, "num_processes": 3}\n')
    assert zero.is_alive()
    others = [threading.Thread(target=rendezvous.join_rendezvous, args=("127.0.0.1", port, 3, i)) for i in (1, 2)]
    for thread in others:
        thread.start()
    for thread in (zero, *others):
        thread.join(60)
    assert results == [None]
    assert not any(thread.is_alive() for thread in others)
    over.set()
    dripping.join()
    for connection in silent:
        connection.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "process 0 ignores a connection from 127.0.0.1, which is no process of this run" in line


def test_process_0_closes_a_connection_that_stays_silent(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 0.3)
    port, results = int(free_address().rpartition(":")[2]), []
    zero = threading.Thread(target=lambda: results.append(rendezvous.serve_rendezvous("127.0.0.1", port, 2)))
    zero.start()
    with connected(port) as connection:
        connection.settimeout(60)
        assert connection.recv(1) == b""
    rendezvous.join_rendezvous("127.0.0.1", port, 2, 1)  # Process 0 still waits for it.
    zero.join(60)
    assert results == [None]
    assert "it sends no whole message within 0.3 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    "payload",
    [
        b"HTTP/1.1 400\r\n\r\n",
        b"[" * 100_000,
        b'{"missing": 1e999}\n',
        b'{"missing": [1e999]}\n',
        b"{}\n",
        b"y" * 100_000,
    ],
)
def test_a_process_that_finds_a_foreign_server_retries_and_then_reports_it(monkeypatch, payload):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.5)
    with (
        server_sending(payload) as port,
        pytest.raises(ProcessLost, match="what answers there is no process 0 that waits"),
    ):
        rendezvous.join_rendezvous("127.0.0.1", port, 2, 1)


def test_a_port_in_use_is_reported():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"--coordinator_address=127.0.0.1:{listener.getsockname()[1]}"
        flags = [address, "--num_processes=2", "--process_id=0", "--workdir=/nowhere"]
        done = forked.run(*MAIN, *flags)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "process 0 cannot serve there" in done.stderr
