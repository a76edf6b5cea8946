"""Random damage to bytes, texts and JSON values."""

import copy
import math

TOKENS = (
    *(
        b"",
        b"0",
        b"-0",
        b"-1",
        b"1e999",
        b"-1e308",
        b"1e-320",
        b"9" * 30,
        b"1" * 5000,
        b"NaN",
        b"inf",
        b"null",
        b"true",
    ),
    *(b"\0", b"\0" * 4096, b"\n", b"\r", b"\r\n", b",", b'"', b'""', b"'", b"\t", b" ", b"=", b"--", b"\\", b"%s"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", "é".encode(), "∞".encode(), "\u2028".encode(), "\u202e".encode()),
    *(
        b"\x1b[2J",
        b"\x1b]0;title\x07",
        b"\x85",
        b"[" * 100_000,
        b"{}",
        b"[]",
        b'{"step":',
        b"2026-02-30",
        b"0x1F",
        b"1_0",
    ),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-320, 1e308, math.inf, math.nan),
    *("", "x", "\x1b[2J", "\u2028", "\ud800", "\0", "x" * 10_000, "1", "sgd", [], [1], ["a"], [[]], {}, {"a": 1}),
)


def damage_bytes(content: bytes, rng) -> bytes:
    """Makes one to three errors like those of a disk, a transfer or an editor."""
    for _ in range(rng.integers(1, 4)):
        at, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        span = content[at : min(end, at + 64)]
        token = TOKENS[rng.integers(len(TOKENS))]
        flipped = bytes([content[at] ^ (1 << rng.integers(8))]) if at < len(content) else b""
        lines = content.split(b"\n")
        line = int(rng.integers(len(lines)))
        content = (
            content[:at] + flipped + content[at + 1 :],
            content[:at],
            content[:at] + content[at + len(span) :],
            content[:end] + span + content[end:],
            content[:at] + token + content[at:],
            content[:at] + token + content[at + len(token) :],
            content[:at] + bytes(len(span)) + content[at + len(span) :],
            b"\n".join((*lines[:line], lines[line], *lines[line:])),
            b"\n".join((*lines[:line], *lines[line + 1 :])),
        )[rng.integers(9)]
    return content


def damage_json(value, rng):
    """Replaces, removes or adds one value inside a JSON value."""
    value = copy.deepcopy(value)
    places = [(None, None)]

    def visit(part):
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                visit(part[key])

    visit(value)
    other = VALUES[rng.integers(len(VALUES))]
    parent, key = places[rng.integers(len(places))]
    how = rng.integers(4)
    if parent is None:
        return other if how == 0 else value
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[f"{key}\x1b"] = other
    elif how == 1:
        parent.append(other)
    else:
        parent[key] = other
    return value
