"""What every refusal has to be."""

LONGEST = 1000  # characters


def check_line(message: str, *named: str) -> None:
    """One printable line, not too long, that names one of some things."""
    assert message.isprintable(), f"not printable: {message!r}"
    assert 0 < len(message) <= LONGEST + 10, f"{len(message)} characters: {message[:200]}"
    assert not named or any(name in message for name in named), f"names none of {named}: {message}"
