"""The command `stable-rnn`: doctor, certify, demo. Bad input prints one line on stderr; the exit code is then 2."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ._errors import UserError, complain, printable
from ._version import __version__

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
DTYPES = ("float32", "float16", "bfloat16", "float64")
CODES = {
    0: "done",
    1: "the output could not be written, or a package could not be loaded",
    2: "wrong arguments or input",
    130: "interrupted",
}
CERTIFY_CODES = {
    0: "every recurrent layer that was found was judged, stable or not",
    3: "some were judged, of others stderr says why not",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        complain(self.prog, f"{printable(message, 1000)} (see {self.prog} --help)")
        self.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    program = "stable-rnn"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding has no letters for
    try:
        try:
            arguments = parser().parse_args(argv)
            program += f" {arguments.command}"
            if sys.stdout is None:
                raise OSError("closed")
            return load(arguments.command)(arguments) or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except UserError as error:
        complain(program, error)
        return 2
    except OSError as error:  # a full disk, for instance
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough
            complain(program, f"{error.filename or 'standard output'}: {error.strerror or error}")
        if error.filename is None:
            sys.stdout = open(os.devnull, "w")  # or Python's own flush at exit fails again
        return 1
    except ImportError as error:
        complain(program, error)
        return 1
    except KeyboardInterrupt:
        return 130


def load(command: str) -> Callable[[argparse.Namespace], int | None]:
    """The function that runs a command, in the module of its name. torch takes seconds to import: not before the arguments are known
    to be good."""
    try:
        from . import backends  # noqa: F401  all of the package

        return getattr(importlib.import_module(f"{__package__}.{command}"), command)
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        raise ImportError(f"cannot be loaded here: {error}") from error


def parser() -> Parser:
    top = Parser(
        prog="stable-rnn",
        description="Stable recurrent networks for PyTorch.",
        epilog="stable-rnn COMMAND --help says more.",
    )
    top.add_argument("--version", action="version", version=f"stable-rnn {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, description: str, example: str, codes: dict[int, str] = CODES) -> Parser:
        listed = "\n".join(f"  {code:<5}{meaning}" for code, meaning in sorted(codes.items()))
        return commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"example:\n  {example}\n\nexit codes:\n{listed}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    doctor = command(
        "doctor",
        "what is installed, which backends run here and why others do not",
        "Prints versions, threads, the GPU if there is one, and the table of backends: which run here, and why the others do not.",
        "stable-rnn doctor --shape lstm,256,1,bfloat16",
    )
    doctor.add_argument(
        "--explain",
        action="store_true",
        help="also say what each backend is for, which kernel a shape gets with its predicted time, and what Verified() begins with",
    )
    doctor.add_argument(
        "--shape",
        action="append",
        type=shape,
        metavar="CELL,H,LANES[,DTYPE]",
        help="explain this shape, such as lstm,256,1,bfloat16; LANES: rows of the batch, or windows or chunks in all; may be given again",
    )

    certify = command(
        "certify",
        "the certificate of every recurrent layer in a checkpoint",
        "Prints how fast each RNN, GRU and LSTM of a checkpoint is proven to forget, and the window that a tolerance needs.\n"
        "Finds state dicts inside of dicts and lists. No code of the file is run: objects in it other than tensors and plain\n"
        "values are passed over.",
        "stable-rnn certify model.pt --input-bound 3",
        CODES | CERTIFY_CODES,
    )
    certify.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file that torch.save wrote (a state dict, or what holds some) or a safetensors file",
    )
    certify.add_argument(
        "--input-bound",
        type=bound,
        default=1.0,
        metavar="B",
        help="largest absolute value of the inputs, 0 to inf (default 1)",
    )

    demo = command(
        "demo",
        "train on real text, then run a long text under every plan (a few minutes)",
        "Trains four character models of the same size (nn.LSTM, ForgetCap, Certified, Cascade), certifies them, runs a long text under\n"
        "every plan, and writes a picture and all numbers.",
        "stable-rnn demo --text book.txt --steps 500 --plan windowed:64 --plan verified",
    )
    demo.add_argument("--text", metavar="FILE", help="a text file; its last tenth is held out")
    demo.add_argument(
        "--data", metavar="DIR", help="a folder with train.txt (or valid.txt) and test.txt, such as ptb or wikitext-2"
    )
    demo.add_argument(
        "--steps", type=positive(int), default=2000, metavar="N", help="training steps per model (default 2000)"
    )
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
        help="recurrent, windowed:K, chunked:CHUNK,WARMUP, verified[:TOL] or scanned (cascades only); may be given again (default: all)",
    )
    demo.add_argument("--seed", type=seed, default=0, metavar="S", help="random seed (default 0)")
    demo.add_argument(
        "--threads", type=positive(int), metavar="N", help="threads for torch (default: torch's own choice)"
    )
    demo.add_argument(
        "--budget",
        type=positive(float),
        default=300,
        metavar="SECONDS",
        help="about how long training and measuring may take; what there is no time for is left out, and said (default 300)",
    )
    demo.add_argument(
        "--out", default="demo-out", metavar="DIR", help="where demo.png and demo.json go (default demo-out)"
    )
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
    if (
        cell not in CELLS
        or dtype not in DTYPES
        or len(rest) != 2
        or not all(n.isdecimal() and 0 < int(n) < 2**31 for n in rest)
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: CELL,H,LANES[,DTYPE] with a cell of {', '.join(CELLS)}, numbers above 0, a dtype of {', '.join(DTYPES)}"
        )
    return cell, int(rest[0]), int(rest[1]), dtype


if __name__ == "__main__":
    sys.exit(main())
