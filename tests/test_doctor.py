"""--mode=doctor reports what would prevent a run from starting."""

import forked
import pytest
from cluster import ROOT, free_address, run_processes, several

from dpreg import doctor
from dpreg.config import Config
from dpreg.distributed import processes
from dpreg.errors import InputError

CHECKS = ["versions", "flags", "network", "clocks", "workdir", "devices", "all-reduce", "rows"]
MAIN = ("-m", "dpreg.main")
DOCTOR = ("--mode=doctor", "--platform=cpu", "--num_devices=2")


def findings(out):
    words = [line.split() for line in out.splitlines()]  # Gloo writes lines, too.
    return {line[1]: line[0] for line in words if len(line) > 1 and line[1] in CHECKS}


def test_the_doctor_passes_all_checks_and_leaves_no_files(tmp_path):
    done = forked.run(*MAIN, *DOCTOR, f"--workdir={tmp_path / 'a' / 'b'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert findings(done.stdout) == dict.fromkeys(CHECKS, "ok")
    assert not (tmp_path / "a").exists()
    output = "".join(out for _, _, out, _ in several(2, tmp_path / "c", "--mode=doctor"))
    assert output.count("ok  ") == len(CHECKS)
    assert "reached by 2 processes" in output
    assert not (tmp_path / "c").exists()


def test_the_doctor_finds_impossible_batch_sizes_and_checkpoint_folders(tmp_path):
    done = forked.run(*MAIN, *DOCTOR, "--batch_size=33", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert findings(done.stdout) == dict.fromkeys(CHECKS, "ok") | {"rows": "WRONG"}
    assert "--batch_size=33: it is not a multiple of --num_shards=8" in done.stdout
    done = forked.run(*MAIN, *DOCTOR, "--resume=must", f"--workdir={tmp_path / 'none'}")
    assert done.returncode == 2
    assert "none holds no checkpoint; name another --workdir, or use --resume=auto" in done.stdout
    trained = (*MAIN, "--platform=cpu", "--num_devices=2", f"--workdir={tmp_path / 'w'}")
    assert forked.run(*trained, "--max_epochs=1").returncode == 0
    for flags, code in ((["--lr=0.5"], 2), (["--lr=0.5", "--resume=never"], 0), ([], 0)):
        done = forked.run(*trained, "--mode=doctor", *flags)
        assert done.returncode == code, done.stdout
        assert ("holds another run: lr was 0.03 and is 0.5" in done.stdout) == (code == 2)


def patched(code, number, *flags):
    return ("-c", f"{code}; from dpreg.main import main; main()"), [*flags, f"--process_id={number}"], ROOT


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        (
            "from dpreg import doctor; doctor.package_versions = lambda: {'jax': '0.1'}",
            "versions",
            "jax is",
        ),
        ("import time; now = time.time; time.time = lambda: now() + 60", "clocks", "clocks are 60.0 s apart"),
        ("import jax; jax.lax.psum = lambda x, axis: jax.lax.pmean(x, axis)", "all-reduce", "instead of 6.0"),
        ("from dpreg import doctor; doctor.read_rows = lambda config: open('/nowhere')", "rows", "No such file"),
    ],
)
def test_a_fault_in_one_process_is_found_by_all_processes(tmp_path, fault, check, message):
    flags = (*DOCTOR, free_address(), "--num_processes=2", f"--workdir={tmp_path}")
    both = fault if check == "all-reduce" else ""  # Both processes must run the same program.
    results = run_processes(patched(both or "pass", 0, *flags), patched(fault, 1, *flags))
    for code, lines, _, _ in results:
        assert (code, len(lines)) == (2, 1), lines
        assert f"--mode=doctor: something is wrong with {check};" in lines[0]
    out = results[0][2]
    assert findings(out) == dict.fromkeys(CHECKS, "ok") | {check: "WRONG"}
    assert message in out
    assert not findings(results[1][2])  # Only process 0 prints the findings.


def test_the_doctor_finds_different_rows_under_the_same_name(tmp_path):
    starts = []
    flags = (*DOCTOR, free_address(), "--num_processes=2", f"--workdir={tmp_path / 'w'}", "--target=y")
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "t.csv").write_text("x,y\n" + "".join(f"{i},{i + number * (i == 7)}\n" for i in range(20)))
        starts.append((MAIN, [*flags, "--dataset=t.csv", f"--process_id={number}"], folder))
    (code, _, out, _), _ = run_processes(*starts)
    assert code == 2
    assert "process 1 reads other rows than process 0" in out


@pytest.mark.parametrize(
    ("coordinator", "hosts", "message"),
    [
        ("127.0.0.1:1", [["a", "10.0.0.1"], ["b", "10.0.0.2"]], "only one machine can reach it; use an address"),
        ("10.0.0.1:1", [["a", "10.0.0.1"], ["b", "127.0.1.1"]], "process 1: its host b resolves its own name to 127"),
        ("10.0.0.1:1", [["a", "10.0.0.1"], ["b", ""]], "resolves its own name to nothing"),
    ],
)
def test_the_doctor_finds_addresses_that_other_hosts_cannot_reach(monkeypatch, coordinator, hosts, message):
    monkeypatch.setattr(processes, "coordinator", lambda: coordinator)
    monkeypatch.setattr(doctor, "_allgather", lambda value: hosts)
    with pytest.raises(InputError, match=message):
        doctor._check_network(Config())
    monkeypatch.setattr(doctor, "_allgather", lambda value: [hosts[0]] * 2)
    assert "reached by 2 processes on a" in doctor._check_network(Config())
