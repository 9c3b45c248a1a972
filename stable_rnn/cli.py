"""The command `stable-rnn`: doctor, certify, demo. Bad input prints one line on stderr; the exit code is then 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ._errors import UserError
from ._version import __version__

CELLS = ("rnn_tanh", "rnn_relu", "lstm")
DTYPES = ("float32", "float16", "bfloat16", "float64")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    arguments = parser().parse_args(argv)
    try:
        if sys.stdout is None:
            raise OSError("closed")
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"stable-rnn {arguments.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, for instance
        print(f"stable-rnn {arguments.command}: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # or Python's own flush at exit fails again
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> Parser:
    top = Parser(prog="stable-rnn", description="Stable recurrent networks for PyTorch.")
    top.add_argument("--version", action="version", version=f"stable-rnn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is installed, which backends run here and why others do not")
    doctor.add_argument("--explain", action="store_true", help="also say what each backend is for, and which kernel a shape gets")
    doctor.add_argument(
        "--shape",
        action="append",
        type=shape,
        metavar="CELL,H,LANES[,DTYPE]",
        help="explain this shape, such as lstm,256,1,bfloat16; LANES: rows of the batch, or windows or chunks in all; may be given again",
    )
    doctor.set_defaults(run=_doctor)

    certify = commands.add_parser("certify", help="the certificate of every recurrent layer in a checkpoint")
    certify.add_argument("checkpoint", metavar="CHECKPOINT", help="file written by torch.save: a state dict, or a dict that holds some")
    certify.add_argument(
        "--input-bound",
        type=bound,
        default=1.0,
        metavar="B",
        help="largest absolute value of the inputs, 0 to inf (default 1)",
    )
    certify.set_defaults(run=_certify)

    demo = commands.add_parser("demo", help="train on real text, then run a long text under every plan (a few minutes)")
    demo.add_argument("--text", metavar="FILE", help="a text file; its last tenth is held out")
    demo.add_argument("--data", metavar="DIR", help="a folder with train.txt (or valid.txt) and test.txt, such as ptb or wikitext-2")
    demo.add_argument("--steps", type=positive(int), default=2000, metavar="N", help="training steps per model (default 2000)")
    demo.add_argument("--hidden", type=positive(int), default=128, metavar="H", help="hidden units (default 128)")
    demo.add_argument(
        "--length",
        type=positive(int),
        default=16384,
        metavar="T",
        help="characters of held-out text to run (default 16384)",
    )
    demo.add_argument(
        "--plan",
        action="append",
        metavar="PLAN",
        help="recurrent, windowed:K, chunked:CHUNK,WARMUP or verified[:TOL]; may be given again (default: all four)",
    )
    demo.add_argument("--seed", type=seed, default=0, metavar="S", help="random seed (default 0)")
    demo.add_argument("--threads", type=positive(int), metavar="N", help="threads for torch (default: torch's own choice)")
    demo.add_argument("--out", default="demo-out", metavar="DIR", help="where demo.png and demo.json go (default demo-out)")
    demo.set_defaults(run=_demo)
    return top


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type: a finite number above zero, an int below 2**31."""

    def parse(text: str) -> float:
        value, end = _number(kind, text), 2**31 if kind is int else float("inf")
        if not 0 < value < end:
            raise argparse.ArgumentTypeError(f"must be above 0{' and below 2**31' if kind is int else ''}, got {text}")
        return value

    return parse


def seed(text: str) -> int:
    """An argparse type: what torch.manual_seed takes."""
    if not -(2**63) <= _number(int, text) < 2**64:
        raise argparse.ArgumentTypeError(f"must lie between -2**63 and 2**64 - 1, got {text}")
    return int(text)


def bound(text: str) -> float:
    """An argparse type: a number that is 0 or more, or inf."""
    if not _number(float, text) >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, or inf; got {text}")
    return float(text)


def _number(kind: Callable[[str], float], text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None


def shape(text: str) -> tuple[str, int, int, str]:
    """An argparse type: cell, hidden size, lanes, dtype."""
    cell, *rest = text.split(",")
    dtype = rest.pop() if len(rest) == 3 else "float32"
    if cell not in CELLS or dtype not in DTYPES or len(rest) != 2 or not all(n.isdecimal() and 0 < int(n) < 2**31 for n in rest):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: CELL,H,LANES[,DTYPE] with a cell of {', '.join(CELLS)}, numbers above 0, a dtype of {', '.join(DTYPES)}"
        )
    return cell, int(rest[0]), int(rest[1]), dtype


# torch takes a second to import: not before the arguments are known to be good.
def _doctor(arguments: argparse.Namespace) -> None:
    from .doctor import doctor

    doctor(arguments.explain, arguments.shape or [])


def _certify(arguments: argparse.Namespace) -> None:
    from .certify import certify

    certify(arguments.checkpoint, arguments.input_bound)


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import demo

    demo(arguments)


if __name__ == "__main__":
    sys.exit(main())
