"""What is said to a person at the command line. Names in it may come from files that nobody should trust."""

from __future__ import annotations

import contextlib
import sys

LONG = 200  # characters of one name; a path may have thousands, a tensor's name millions
LONG_LINE = 4000


class UserError(Exception):
    """Something a person at the command line can put right; its one line is printed and the exit code is 2."""


def printable(name: object, most: int = LONG) -> str:
    """`name` as one line that a terminal only shows: control characters, line breaks, what turns the direction of writing and lone
    surrogates as escapes (\\x1b), and the middle of a long one left out."""
    text = str(name)
    if len(text) > most:
        text = f"{text[: most // 2]}[...]{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(command: str, message: object) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError, ValueError):  # stderr full or closed: there is nowhere left to say so
        print(f"{command}: {printable(message, LONG_LINE)}", file=sys.stderr, flush=True)
