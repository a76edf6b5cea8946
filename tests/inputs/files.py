"""Unusual paths: pipes, devices, folders, names in other encodings, and headers that announce terabytes."""

import io
import os
import zipfile

import dpreg

from .mutate import TOKENS
from .refusal import check_line

ROWS = "a,b,y\n" + "".join(f"{i},{i * i % 7},{i % 5 - 2}\n" for i in range(30))
SUFFIXES = (".csv", ".csv.gz", ".parquet", ".npy", ".npz", "")
HUGE = ((10**12,), (10**12, 3), (3, 10**9), (10**6, 10**6), (2**63, 2**63), (-1,), (0,), (), (2, 2, 2))
ODD_NAMES = (
    "a\nb",
    "\x1b[2J",
    "\u2028",
    "\udcff",
    "a b",
    "--x",
    "*",
    "[",
    "t.csv",
    "~",
    "$HOME",
    "%s",
    "{}",
    "a" * 250,
)


def run(rng, folder):
    path = MAKERS[rng.integers(len(MAKERS))](rng, folder)
    try:
        data = dpreg.read_table(path, dpreg.Columns(target=("y",)), cache_dir=str(folder / "cache"))
    except dpreg.InputError as error:
        check_line(str(error))
        return "refused"
    sources = [source for source in (data.train, data.val) if source]
    assert sum(map(len, sources)) == 30, "the rows differ"
    assert data.schema.features == ("a", "b")
    return "correct"


def make_pipe(rng, folder):
    path = folder / f"t{SUFFIXES[rng.integers(len(SUFFIXES))]}"
    os.mkfifo(path)
    return str(path)


def make_device(rng, folder):
    path = folder / f"t{SUFFIXES[rng.integers(len(SUFFIXES))]}"
    path.symlink_to(
        ("/dev/zero", "/dev/null", "/dev/full", "/dev/urandom", "/dev/stdin", "/proc/self/mem", "/")[rng.integers(7)]
    )
    return str(path)


def make_folder(rng, folder):
    """Makes a folder with tables and other files."""
    for part in range(rng.integers(0, 2)):
        (folder / f"p{part}.csv").write_text(ROWS)
    for _ in range(rng.integers(0, 3)):
        beside = folder / f"x{rng.integers(9)}{SUFFIXES[rng.integers(len(SUFFIXES))]}"
        how = rng.integers(4)
        if how == 0:
            beside.mkdir(exist_ok=True)
        elif how == 1 and not beside.exists():
            os.mkfifo(beside)
        elif how == 2 and not beside.exists():
            beside.symlink_to(folder / "nowhere.csv")
        elif how == 3 and not beside.exists():
            beside.write_bytes(TOKENS[rng.integers(len(TOKENS))])
    return str(folder)


def make_odd_name(rng, folder):
    path = f"{folder}/{ODD_NAMES[rng.integers(len(ODD_NAMES))]}{SUFFIXES[rng.integers(2)][:4]}"
    if rng.random() < 0.7:
        with open(path, "w") as file:
            file.write(ROWS)
    return path


def make_promise(rng, folder):
    """Writes an array whose header states any size, but with few bytes of data."""
    shape, kind = (
        HUGE[rng.integers(len(HUGE))],
        ("<f8", "|b1", "<U9", "<f2", "<c16", "|O", "<M8[s]", "|V9")[rng.integers(8)],
    )
    head = f"{{'descr': '{kind}', 'fortran_order': {bool(rng.integers(2))}, 'shape': {shape}, }}"
    content = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + head.ljust(117).encode() + b"\n" + bytes(64)
    if rng.random() < 0.5:
        (folder / "t.npy").write_bytes(content)
        return str(folder / "t.npy")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as members:
        members.writestr(f"v{TOKENS[rng.integers(len(TOKENS))].decode(errors='replace')[:50]}y.npy", content)
        members.writestr("a.npy", content)
    written = bytearray(stream.getvalue())
    if rng.random() < 0.5:
        written[rng.integers(len(written))] ^= 1 << rng.integers(8)
    (folder / "t.npz").write_bytes(written)
    return str(folder / "t.npz")


def make_wide(rng, folder):
    columns, rows = int(rng.choice([20_000, 60_000])), int(rng.integers(0, 3))
    names = [f"c{i}" for i in range(columns)] if rng.random() < 0.7 else ["c"] * columns
    (folder / "t.csv").write_text(",".join(names) + "\n" + (",".join("1" * columns) + "\n") * rows)
    return str(folder / "t.csv")


MAKERS = (make_pipe, make_device, make_folder, make_odd_name, make_odd_name, make_promise, make_promise, make_wide)
