"""Wrong command lines: one line names the error, its place and the remedy; exit code 2, and no files are left."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dpreg import cli
from dpreg.errors import InputError
from dpreg.outputs.workdir import make_folder

ROOT = pathlib.Path(__file__).parent.parent

# One process imports the entry point; each command runs in a fork, in its own folder, with its output in files.
_PROGRAM = """
import importlib, json, os, sys
module, codes = importlib.import_module(f"dpreg.{sys.argv[1]}"), []
for number, line in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        os.mkdir(str(number))
        os.chdir(str(number))
        for stream in (1, 2):
            os.dup2(os.open(f"../{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [f"dpreg.{sys.argv[1]}", *line]
        try:
            module.main()
        except SystemExit as end:  # A normal interpreter exit takes a second.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""

_NEW = "--workdir=new/w"
_GOOD, _DATES = ("--dataset={}/good.csv", "--target=y", "--cache_dir={}/cache"), ("--dataset={}/date.csv", "--target=y")
_TABLES = {
    "good.csv": "a,b,y\n" + "".join(f"{i},{i * i % 7},{i % 5 - 2}\n" for i in range(60)),
    "text.csv": "a,b,y\n1,2,3\n4,x,6\n",
    "nan.csv": "a,b,y\n1,2,3\n4,nan,6\n",
    "missing.csv": "a,b,y\n1,2,3\n4,,6\n",
    "infinite.csv": "a,b,y\n1,2,3\n4,1e300,6\n",
    "ragged.csv": "a,b,y\n1,2,3\n4,5\n",
    "nothing.csv": "",
    "headed.csv": "a,b,y\n",
    "twice.csv": "a,a,y\n1,2,3\n",
    "broken.parquet": "PAR1 not really",
    "date.csv": "a,b,y\n2026-01-01,1,3\n2026-01-02,1,4\n",
    "time.csv": "a,b,y\n12:30:00,1,3\n12:31:00,1,4\n",
    "mixed/a.csv": "a,y\n1,2\n",
    "mixed/b.npy": "",
    "empty/note.txt": "",
    "file": "",
    "preset.cfg": "--config_preset=cpu\n",
    "bad.cfg": "--batchsize=3\n",
    "value.cfg": "# rows\n--lr=0.1\n  --batch_size=many\n",
    "cut/summary.json": "{",
    "other/summary.json": "{}",
    "other/flags.cfg": "",
}

# entry point -> command line -> message.
WRONG = {
    "main": {
        ("--batchsize=64",): "--batchsize: there is no such flag; use --batch_size, or see --help",
        ("--batch-size=64",): "--batch-size: there is no such flag; use --batch_size, or see --help",
        ("--learning_rate=0.1",): "--learning_rate: there is no such flag; use --lr, or see --help",
        ("--learning-rate", "0.1"): "--learning-rate: there is no such flag; use --lr, or see --help",
        ("--epochs=3",): "--epochs: there is no such flag; use --max_epochs, or see --help",
        ("--device=cpu",): "--device: there is no such flag; use --num_devices, or see --help",
        ("--devices=4",): "--devices: there is no such flag; use --num_devices, or see --help",
        ("--num-devices=4",): "--num-devices: there is no such flag; use --num_devices, or see --help",
        ("--noaudti",): "--noaudti: there is no such flag; use --audit, or see --help",
        ("--xyz",): "--xyz: there is no such flag; see --help",
        ("--weight_decay=0.1",): "--weight_decay: there is no such flag; use --l2, or see --help",
        ("--flagfile={}/bad.cfg",): "{}/bad.cfg: --batchsize: there is no such flag; use --batch_size, or see --help",
        ("--flagfile={}/value.cfg",): "{}/value.cfg: --batch_size=many: use an integer",
        ("--lr=x", "--flagfile={}/value.cfg"): "--lr=x: use a number",
        ("--batch_size=8", "--flagfile={}/value.cfg"): "{}/value.cfg: --batch_size=many: use an integer",
        ("--" + "long" * 2000,): "there is no such flag; see --help",
        ("--\x1b[2J",): "--\\x1b[2J: there is no such flag; see --help",
        ("--data_dir=a\nb",): "--data_dir='a b': has characters that cannot be printed; rename it",
        ("--data_dir=a ",): "--data_dir='a ': a flagfile cannot hold a line break, a trailing blank or invalid UTF",
        ("train",): "train: is not a flag; give flags as --name=value",
        ("a", "b"): "a: is not a flag; give flags as --name=value",
        (
            "--flagfile=nowhere.cfg",
        ): "--flagfile=nowhere.cfg: No such file or directory; name a file with a flag in each",
        ("--flagfile={}/mixed",): "--flagfile={}/mixed: Is a directory; name a file with a flag in each line",
        ("--config_preset=cup",): "--config_preset=cup: there is none; use cpu, gpu or tpu",
        ("--config_preset", "cpu"): "--config_preset: write --config_preset=NAME, on the command line",
        ("--flagfile={}/preset.cfg",): "--config_preset: write --config_preset=NAME, on the command line",
        ("--lr=x",): "--lr=x: use a number",
        ("--max_epochs=1.5",): "--max_epochs=1.5: use an integer",
        ("--audit=maybe",): "--audit=maybe: use true or false",
        ("--lr",): "--lr: has no value; give flags as --name=value",
        ("--lr=nan",): "--lr=nan: use a finite number",
        ("--max_epochs=0",): "--max_epochs=0: use 1 or more",
        ("--workdir=gs://bucket/run",): "--workdir=gs://bucket/run: is not a path of this machine; mount",
        (
            "--sync_batch_norm",
        ): "--sync_batch_norm: it applies only to --model=mlp with --batch_norm; give both, or leave it out",
        ("--model=mlp", "--batch_norm", "--sync_batch_norm", "--reduction=ordered"): (
            "--sync_batch_norm: it needs all shards at once, and --reduction=ordered computes them one by one; leave"
        ),
        ("--model=mlp", "--hidden="): "--hidden=: give at least one width, or use --model=linear",
        ("--num_devices=0",): "--num_devices=0: use 1 or more",
        ("--num_devices=9",): "use --num_devices=8 or --num_shards=9",
        ("--num_devices=50000",): "use --num_devices=8 or --num_shards=50000",
        ("--batch_size=30",): "use --batch_size=24 or 32",
        ("--lr=-1",): "--lr=-1.0: use a value above 0",
        ("--standardize",): "--standardize: synthetic rows have mean 0 and standard deviation 1 already; leave it out",
        ("--target=y",): "--target=y: it applies only to tables; name one with --dataset, or leave it out",
        (
            "--validation_dataset={}/good.csv",
        ): "good.csv: it applies only to tables; name one with --dataset, or leave it out",
        ("--target_transform=log",): "--target_transform=log: it applies only to tables; name one with",
        ("--platform=abacus",): "use cpu, gpu or tpu",
        ("--platform=gpu",): "use --platform=cpu",
        ("--mode=cure",): "use train, evaluate, predict, summary or doctor",
        (
            "--mode=summary",
            "--output=t.csv",
        ): "--output=t.csv: name a file for the table, with --output=FILE.txt, FILE.md",
        ("--mode=summary", "--workdir={}/empty"): "{}/empty/model: there is no model; train with that --workdir",
        ("--interval=0.9",): "--interval=0.9: it applies only to --mode=predict or summary; leave it out",
        ("--predict_mean",): "--predict_mean: it applies only to --mode=evaluate or predict; leave it out",
        ("--step_timeout=-1",): "use 0 or more",
        ("--coordinator_address=node:1234",): "go together; give all three",
        ("--coordinator_address=node:1234", "--num_processes=2", "--process_id=2"): "use 0 to 1",
        ("--coordinator_address=node", "--num_processes=2", "--process_id=0"): "give the host and the port",
        ("--coordinator_address=a:1", "--num_processes=2", "--process_id=0", "--workdir="): "all of them see",
        ("--coordinator_address=auto",): "JAX finds no cluster to ask here",
        (f"--seed=1{'0' * 400}",): "use a value under 2,147,483,648",
        ("--max_epochs=100000000",): "that is 3,200,000,000 steps, and they are counted up to 2,147,483,647; use",
        ("--warmup_steps=3000000000",): "--warmup_steps=3000000000: use a value under 2,147,483,648",
        ("--b=1e39",): "b holds numbers that are not finite as float32; use smaller ones",
        ("--seed=3000000000",): "--seed=3000000000: use a value under 2,147,483,648",
        ("--num_train=3000000000",): "are too many rows; use fewer than 2,147,483,648",
        ("--w=a,b",): "--w=a,b: give numbers separated by commas",
        ("--hidden=1.5",): "--hidden=1.5: give whole numbers separated by commas",
        ("--profile=5:3",): "--profile=5:3: give two steps, the earlier first, such as --profile=100:200",
        ("--profile=500:600", "--max_epochs=1"): "--profile=500:600: the run has 32 steps; name two of them, from 0",
        ("--solver=irls", "--loss=huber"): "gamma, tweedie or negative_binomial; use --solver=sgd",
        ("--solver=exact", "--model=mlp"): "--solver=exact: it applies only to --model=linear or concise; use",
        ("--solver=exact", "--l1=0.1", "--loss=huber"): "with --l1=0.1 it applies only to --loss=squared, logistic,",
        ("--covariance=HC3", "--l1=0.1", "--solver=exact"): "standard errors are unknown with --l1=0.1; leave one out",
        ("--covariance=HC3", "--folds=3"): "standard errors are unknown with --folds=3; leave one out",
        ("--folds=1",): "--folds=1: use 2 or more, or 0 for no cross-validation",
        ("--folds=5", "--l1=0.1"): "--l1=0.1: --folds=5 chooses it; leave one out",
        ("--folds=5", "--loss=huber"): "--folds=5: it applies only to --model=linear or concise with --loss=squared",
        ("--folds=5", "--solver=sgd"): "--folds=5: it applies only to --solver=exact; leave one out",
        ("--folds=1001",): "--folds=1001: there are 1,000 rows to fit; use so many folds at most, or give more rows",
        ("--l1_ratio=0.5",): "--l1_ratio=0.5: it applies only with --folds; give both, or --l1 and --l2",
        ("--folds=5", "--l1_ratio=2"): "--l1_ratio=2.0: use 1 or less",
        (
            "--solver=exact",
            "--loss=huber",
            "--nointercept",
        ): "with --nointercept it applies only to --loss=squared, logistic",
        ("--solver=exact", "--patience=3"): "--patience=3: it applies only to --solver=sgd; leave one out",
        ("--l1=0.1", "--optimizer=adam"): "only --optimizer=sgd reaches its optimum; use that, or --l2",
        ("--num_processes=2",): "go together; give all three",
        ("--reduction=mean",): "--reduction=mean: use pmean or ordered",
        ("--platform=tpu",): "--platform=tpu: there is none; this machine has",
        ("--patience=3", "--num_val=0"): "--patience=3: there are no rows held out to measure by; hold some out",
        ("--resume=must",): "holds no checkpoint that can be read; name another --workdir, or use --resume=auto",
        ("--model=nowhere:Net",): "No module named 'nowhere'; correct that, or name another class",
        ("--dataset={}/nowhere.csv", "--target=y"): "there is no such file; name one, or a folder with some, of .csv",
        (
            "--dataset={}/empty",
            "--target=y",
        ): "{}/empty: there is no readable file in that folder; name one, or a folder",
        ("--dataset={}/mixed", "--target=y"): "different kinds, .csv and .npy; name those of one kind, by a pattern",
        ("--dataset=tfds:nowhere",): "prepare it with file_format=array_record, and name its folder",
        ("--dataset=nowhere", "--target=y"): "there is no such file",
        ("--dataset={}/good.csv",): "--target=COLUMN",
        ("--dataset={}/text.csv", "--target=y"): "text.csv, row 2: column 'b' has 'x', which is no number",
        ("--dataset={}/nan.csv", "--target=y"): "column 'b' has 1, the first in {}/nan.csv, row 2",
        ("--dataset={}/missing.csv", "--target=y"): "column 'b' has 1, the first in {}/missing.csv, row 2",
        (
            "--dataset={}/infinite.csv",
            "--target=y",
        ): "infinite.csv, row 2: column 'b' has a value that is not finite",
        ("--dataset={}/ragged.csv", "--target=y"): "row 2: Expected 3 columns, got 2",
        ("--dataset={}/nothing.csv", "--target=y"): "Empty CSV file",
        ("--dataset={}/headed.csv", "--target=y"): "there are no rows",
        ("--dataset={}/twice.csv", "--target=y"): "there are two columns 'a'",
        ("--dataset={}/broken.parquet", "--target=y"): "not a readable parquet file",
        (*_GOOD, "--target=z"): "{}/good.csv: column 'z' is not there; use one of 'a', 'b', 'y'",
        (*_GOOD, "--dates=y"): "--dates=y is not a feature; leave it out there, or name it in --features",
        (*_GOOD, "--nointercept", "--precision=bfloat16"): "three digits of the features; use --precision=float32",
        (*_GOOD, "--loss=logistic"): (
            "--loss=logistic: column 'y' has 5 labels, '-2', '-1', '0', '1', '2', and is defined for two; use --loss"
        ),
        (*_GOOD, "--target_transform=log"): "good.csv, row 1: column 'y' is not above 0, and has no logarithm; use",
        (*_GOOD, "--weight_column=y", "--target=b"): "the weight is negative; use 0 or more",
        (
            *_GOOD,
            "--cache_dir=/proc/x",
        ): "--cache_dir=/proc/x: cannot be written: No such file or directory; name another",
        (
            *_DATES,
            "--cache_dir={}/cache",
        ): "date.csv, row 1: column 'a' has '2026-01-01', which is no number; use --dates=a",
        (
            "--dataset={}/time.csv",
            "--target=y",
        ): "'a' has '12:30:00', which is no number; choose columns with --features or",
        ("--workdir={}/file",): "--workdir={}/file: cannot be written: File exists; name another folder",
        ("--workdir=/proc/w",): "--workdir=/proc/w: cannot be written: No such file or directory; name another folder",
        (
            "--mode=evaluate",
            *_GOOD,
            "--workdir={}/empty",
        ): "{}/empty/model: there is no model; train with that --workdir",
    },
    "plan": {
        ("--topolgy=v5p:2x2x2",): "--topolgy: there is no such flag; use --topology, or see --help",
        ("--topology=abacus",): "--topology=abacus: use KIND:SHAPE",
        ("--topology=v5p:3x3",): "there is no such slice of several chips; use one of v5p: 2x2x1",
        ("--batch_size=30",): "--batch_size=30: it is not a multiple of --num_shards=8; use --batch_size=24 or 32",
        ("--workdir={}/file",): "--workdir={}/file: cannot be written: File exists; name another folder",
        ("--solver=exact",): "--solver=exact: only a training step of one process has a plan; leave it out",
        ("--mode=doctor",): "--mode=doctor: only a training step of one process has a plan",
    },
    "scaling": {
        ("--num_shards=3", "--batch_size=32"): "--batch_size=32: it is not a multiple of --num_shards=3",
        ("--solver=exact",): "--solver=exact: scaling measures training steps",
        ("--mode=doctor",): "--mode=doctor: scaling measures training steps",
        ("--epochs=3",): "--epochs: there is no such flag; use --max_epochs, or see --help",
        (
            "--reduction=ordered",
        ): "--reduction=ordered: scaling measures training steps with one exchange each; leave it out",
    },
    "report": {
        (): "there is no run to show; name the workdirs of some: python -m dpreg.report W1 W2",
        ("nowhere",): "nowhere: holds no finished run; name the workdir of one",
        ("{}/cut",): "{}/cut/summary.json: is not a summary of dpreg (",
        ("{}/other",): "{}/other/summary.json: is not a summary of dpreg (it has no 'device_count'); name the",
        ("{}/other", "--output=x.pdf"): "--output=x.pdf: unknown kind; use FILE.html or FILE.svg",
        ("--outptu=x.svg",): "--outptu: there is no such flag; use --output, or see --help",
    },
}


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "dpreg: interrupted\n"),
        (InputError("a: b;\n c"), 2, "dpreg: a: b; c\n"),
        (PermissionError(13, "no", "file"), 2, "dpreg: file: no; repair it, or name another\n"),
    ],
)
def test_every_entry_point_reports_an_error_in_one_line(raised, code, message, capsys):
    def main(argv):
        raise raised

    with pytest.raises(SystemExit) as end:
        cli._run_main(main, [])
    assert (end.value.code, capsys.readouterr().err) == (code, message)


def test_an_error_removes_the_new_files_but_no_checkpoint(tmp_path):
    for name, kept in (("new/w", False), ("run", True)):
        with contextlib.suppress(InputError), make_folder(tmp_path / name) as folder:
            if kept:
                (folder / "checkpoints" / "7").mkdir(parents=True)
            raise InputError("wrong")
        assert (tmp_path / name).exists() == kept
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_is_refused_in_one_line_with_a_remedy_and_leaves_no_files(name, tmp_path):
    tables, here = tmp_path / "tables", tmp_path / "here"
    for file, text in _TABLES.items():
        (tables / file).parent.mkdir(parents=True, exist_ok=True)
        (tables / file).write_text(text)
    here.mkdir()
    before = sorted(tables.rglob("*"))
    lines = [[*([_NEW] if name != "report" else []), *(f.format(tables) for f in line)] for line in WRONG[name]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM, name],
        input=json.dumps(lines),
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    wrong = []
    for number, (code, message) in enumerate(zip(json.loads(done.stdout), WRONG[name].values(), strict=True)):
        out, stderr = ((here / f"{number}.{stream}").read_text() for stream in (1, 2))
        left = list((here / str(number)).iterdir())
        one_line = stderr.startswith("dpreg: ") and stderr[:-1].isprintable() and not stderr.endswith(".\n")
        if (code, out, left, one_line) != (2, "", [], True) or message.format(tables) not in stderr:
            wrong.append((lines[number], code, out, stderr, left))
    assert not wrong, "\n".join(map(str, wrong))
    assert [path for path in sorted(tables.rglob("*")) if "cache" not in path.parts] == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "local: the following arguments are required: --processes; see --help"),
        (("--processes=0",), "local: --processes=0: use 1 or more; see --help"),
        (("--processes=2", "--max_restarts=-1"), "local: --max_restarts=-1: use 0 or more; see --help"),
    ],
)
def test_the_launcher_reports_a_wrong_command_in_one_line(flags, message):
    done = subprocess.run([sys.executable, ROOT / "launch" / "local.py", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")
