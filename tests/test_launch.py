"""The launchers: Open MPI and Slurm run for real if they are installed; the others are checked statically."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import forked
import psutil
import pytest
import yaml
from cluster import complete, wait_until

from dpreg.config import Config

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
WORK = ("--platform=cpu", "--num_devices=4", "--reduction=ordered", "--max_epochs=2")


def sha_of(workdir):
    return json.loads((workdir / "summary.json").read_text())["params_sha256"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    assert forked.run("-m", "dpreg.main", *WORK, f"--workdir={workdir}").returncode == 0
    return sha_of(workdir)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_an_open_mpi_run_gives_the_bits_of_one_process(tmp_path, alone):
    environment = os.environ | {"MPIRUN_FLAGS": "--allow-run-as-root --oversubscribe", "PYTHON": sys.executable}
    command = [LAUNCH / "mpi.sh", "2", *WORK, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "of 2 processes" in done.stderr
    assert sha_of(tmp_path) == alone


@pytest.mark.faults
@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
@pytest.mark.parametrize("whom", ["a process", "the script"])
def test_a_preempted_open_mpi_run_restarts_unless_it_was_asked_to_stop(tmp_path, whom):
    environment = os.environ | {"MPIRUN_FLAGS": "--allow-run-as-root --oversubscribe", "PYTHON": sys.executable}
    flags = [*WORK, "--num_train=20000", "--max_epochs=4", f"--workdir={tmp_path}", "--checkpoint_every_steps=100"]
    script = subprocess.Popen(
        [LAUNCH / "mpi.sh", "2", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert wait_until(lambda: complete(tmp_path), script)
        below = psutil.Process(script.pid).children(recursive=True)
        workers = [process for process in below if process.cmdline()[1:3] == ["-m", "dpreg.main"]]
        (script if whom == "the script" else workers[1]).send_signal(signal.SIGTERM)
        output = script.communicate(timeout=200)[1]
    finally:
        for process in [*below, script]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert ("going on from step" in output) == (whom == "a process"), output
    assert script.returncode == (0 if whom == "a process" else 75), output


@pytest.fixture
def slurm(tmp_path):
    """Starts a Slurm cluster of one node, with its own configuration, key and ports; returns its environment."""
    host = socket.gethostname().split(".")[0]
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    # The path is short because it holds a socket.
    folder = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / f"dpreg-slurm-{os.getpid()}"
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


@pytest.mark.faults
@pytest.mark.skipif(not shutil.which("slurmctld") or os.geteuid() != 0, reason="needs Slurm and root to start it")
def test_a_slurm_run_gives_the_bits_of_one_process(tmp_path, slurm, alone):
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


ANY = object()
METADATA = {"name": str, "labels": ANY, "annotations": ANY, "namespace": str}
POD_SPEC = {
    "serviceAccountName": str,
    "restartPolicy": ("Never",),  # A pod failure policy requires it.
    "terminationGracePeriodSeconds": int,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
            "resources": {"limits": ANY, "requests": ANY},
            "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
        }
    ],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB_SPEC = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": ("FailJob", "FailIndex", "Ignore", "Count"),
                "onExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]},
            }
        ]
    },
    "template": {"metadata": METADATA, "spec": POD_SPEC},
}
# The fields of jobset.x-k8s.io/v1alpha2, and of batch/v1 and v1 inside it, that a launcher may need.
JOBSET_SPEC = {
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
    "failurePolicy": {
        "maxRestarts": int,
        "restartStrategy": ("Recreate", "BlockingRecreate"),
        "rules": [
            {
                "name": str,
                "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                "onJobFailureReasons": [str],
                "targetReplicatedJobs": [str],
            }
        ],
    },
    "successPolicy": {"operator": ("All", "Any"), "targetReplicatedJobs": [str]},
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"metadata": METADATA, "spec": JOB_SPEC}}],
}


def check_fields(value, fields, path):
    if fields is ANY:
        return
    if isinstance(fields, dict):
        assert isinstance(value, dict), path
        for name, below in value.items():
            assert name in fields, f"{path}.{name} is no field of it"
            check_fields(below, fields[name], f"{path}.{name}")
    elif isinstance(fields, list):
        assert isinstance(value, list), path
        for number, below in enumerate(value):
            check_fields(below, fields[0], f"{path}[{number}]")
    elif isinstance(fields, tuple):
        assert value in fields, path
    else:
        assert type(value) is fields, path


def test_the_jobset_uses_only_fields_that_exist():
    *roles, jobset = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    assert [document["kind"] for document in roles] == ["ServiceAccount", "Role", "RoleBinding"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    check_fields(jobset["spec"], JOBSET_SPEC, "spec")
    check_fields(jobset["metadata"], METADATA, "metadata")
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert pod["serviceAccountName"] == roles[0]["metadata"]["name"] == roles[2]["subjects"][0]["name"]
    (container,) = pod["containers"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    known = {field.name for field in dataclasses.fields(Config)} | {"config_preset"}
    assert {argument.removeprefix("--").partition("=")[0] for argument in container["args"]} <= known


def test_every_launcher_documents_what_was_not_run():
    for path in LAUNCH.iterdir():
        if path.suffix in (".sh", ".sbatch", ".yaml"):
            assert "Not run:" in path.read_text(), path.name
