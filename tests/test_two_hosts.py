"""Two network namespaces joined by a virtual cable act as two hosts; then the cable is cut."""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import pytest
from cluster import ROOT, WORK, alone, complete, end, outcome, wait_until

PORT = 29500
HOSTS = {"red": "10.77.0.1", "blue": "10.77.0.2"}


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def can_make_hosts():
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"dpreg{os.getpid()}"
    made = ip("netns", "add", name, check=False).returncode == 0
    ip("netns", "del", name, check=False)
    return made


pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and unshare to make network namespaces")


@pytest.fixture
def hosts(tmp_path):
    """Yields (command prefix of each host, function that connects and cuts the cable)."""
    names = {host: f"dpreg-{host}-{os.getpid()}" for host in HOSTS}
    with contextlib.ExitStack() as stack:
        for host, name in names.items():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name, check=False)
            (tmp_path / host).write_text("127.0.0.1 localhost\n" + "".join(f"{a} {h}\n" for h, a in HOSTS.items()))
        red, blue = names.values()
        ip("link", "add", "cable", "netns", red, "type", "veth", "peer", "name", "cable", "netns", blue)
        for host, name in names.items():
            ip("-n", name, "address", "add", f"{HOSTS[host]}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")

        def command(host):
            script = f'hostname {host}; mount --bind "$0" /etc/hosts; exec "$@"'
            prefix = ["ip", "netns", "exec", names[host], "unshare", "--mount", "--uts"]
            return [*prefix, "sh", "-c", script, str(tmp_path / host), sys.executable, "-m", "dpreg.main"]

        yield [command(host) for host in HOSTS], lambda state: ip("-n", red, "link", "set", "cable", state)


def launch(commands, *flags):
    """Starts a process on each host."""
    address = f"--coordinator_address={HOSTS['red']}:{PORT}"
    return [
        subprocess.Popen(
            [*command, *flags, address, "--num_processes=2", f"--process_id={number}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]


def results(running, timeout):
    try:
        outputs = ["\n".join(process.communicate(timeout=timeout)) for process in running]
    finally:
        end(running)
    return [process.returncode for process in running], outputs


@pytest.mark.faults
def test_a_cut_cable_ends_both_hosts_and_a_restart_finishes_with_the_same_bits(tmp_path, hosts):
    commands, cable = hosts
    codes, outputs = results(launch(commands, "--mode=doctor", "--platform=cpu", f"--workdir={tmp_path / 'd'}"), 100)
    assert codes == [0, 0], outputs
    assert "reached by 2 processes on blue, red" in outputs[0]

    work = (*WORK, "--num_train=3200")  # 2000 steps
    flags = (*work, "--num_devices=4", f"--workdir={tmp_path / 'w'}", "--checkpoint_every_steps=100")
    running = launch(commands, *flags)
    assert wait_until(lambda: complete(tmp_path / "w"), running[0])
    cable("down")
    cut = time.monotonic()
    codes, outputs = results(running, 60)
    assert codes == [76, 76], outputs
    assert time.monotonic() - cut < 15
    assert all("start all again to go on from the newest checkpoint" in text for text in outputs)

    cable("up")
    codes, outputs = results(launch(commands, *flags), 240)
    assert codes == [0, 0], outputs
    assert "going on from step" in outputs[0]
    alone(tmp_path / "alone", work=work)
    assert outcome(tmp_path / "w") == outcome(tmp_path / "alone")
