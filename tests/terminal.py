"""Runs a command in a pseudo-terminal of 100 columns and prints its output: `terminal.py COMMAND ...`."""

import fcntl
import os
import pty
import struct
import sys
import termios


def _read(descriptor: int) -> bytes:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    return os.read(descriptor, 4096)


if __name__ == "__main__":
    sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:], _read)))
