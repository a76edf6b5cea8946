"""The launchers: real Open MPI and Slurm where they are installed; the others as far as can be checked."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
WORK = ("--platform=cpu", "--num_devices=4", "--reduction=ordered", "--max_epochs=2")


def sha_of(workdir):
    return json.loads((workdir / "summary.json").read_text())["params_sha256"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "dpreg.main", *WORK, f"--workdir={workdir}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    return sha_of(workdir)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_open_mpi_trains_to_the_bits_of_one_process(tmp_path, alone):
    environment = os.environ | {"MPIRUN_FLAGS": "--allow-run-as-root --oversubscribe", "PYTHON": sys.executable}
    command = [LAUNCH / "mpi.sh", "2", *WORK, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "of 2 processes" in done.stderr
    assert sha_of(tmp_path) == alone


@pytest.fixture
def slurm(tmp_path):
    """A cluster of one node on this host, with a configuration, keys and ports of its own; its environment."""
    host = socket.gethostname().split(".")[0]
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    folder = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"dpreg-slurm-{os.getpid()}"  # short: it holds a socket
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        f"""ClusterName=dpreg
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons = []
    try:
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={folder}/key", *munge],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", host],
        ):
            with (folder / f"{command[0]}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not shutil.which("slurmctld") or os.geteuid() != 0, reason="needs Slurm and root to start it")
def test_slurm_trains_to_the_bits_of_one_process(tmp_path, slurm, alone):
    log = tmp_path / "log"
    command = ["sbatch", "--wait", f"--output={log}", "--overcommit", "--ntasks=2", LAUNCH / "slurm.sbatch"]
    done = subprocess.run(
        [*command, *WORK, f"--workdir={tmp_path / 'w'}"],
        cwd=ROOT,
        env=slurm,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    assert "of 2 processes" in log.read_text()
    assert sha_of(tmp_path / "w") == alone


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_launcher_says_what_was_run():
    for path in LAUNCH.iterdir():
        if path.suffix in (".sh", ".sbatch", ".yaml"):
            assert "Not run:" in path.read_text(), path.name
