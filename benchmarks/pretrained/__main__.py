"""`python -m benchmarks.pretrained list | passes | speed`: see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..jsonl import Log
from . import __doc__ as about
from . import counts, speed
from .fetch import Missing
from .networks import NETWORKS, layers

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.pretrained", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["list", "passes", "speed"])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--steps", type=int, default=8192, help="T (default 8192)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each comparison of speeds (default 4)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="runs nothing, prints the table of what was measured")
    args = parser.parse_args()
    for name in args.packages:
        if name not in NETWORKS:
            parser.error(f"{name!r} is none of {', '.join(NETWORKS)}")
    kind = speed if args.what == "speed" else counts
    log = None
    if args.what != "list":
        file = args.out / f"pretrained_{args.what}.jsonl"
        log = Log(file, dict(torch=torch.__version__, threads=torch.get_num_threads()), resume=True)
    for layer in () if args.table else layers(args.steps, args.packages):
        if isinstance(layer, Missing):
            print(f"missing: {layer}", flush=True)
            continue
        name = f"{layer.package} {layer.version}: {layer.network}, layer {layer.layer}"
        if log is None:
            print(f"{name}: {layer.module}, T = {len(layer.x)}", flush=True)
            continue
        same = lambda r, x=layer: all(r[k] == getattr(x, k) for k in ("package", "network", "layer"))  # noqa: E731
        if not any(same(r) for r in log.rows):
            log.add(speed.row(layer, args.seconds) if kind is speed else counts.row(layer))
            print(log.rows[-1], flush=True)
    if log is not None:
        print(kind.table(log.rows))


if __name__ == "__main__":
    main()
