"""The rules for every error message."""

LONGEST = 1000  # characters


def check_line(message: str, *named: str) -> None:
    """Checks that a message is one short printable line that contains one of the given names."""
    assert message.isprintable(), f"not printable: {message!r}"
    assert 0 < len(message) <= LONGEST + 10, f"{len(message)} characters: {message[:200]}"
    assert not named or any(name in message for name in named), f"contains none of {named}: {message}"
