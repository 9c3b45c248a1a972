"""Parts of `benchmarks.gpu_targets`: long sequences whose memory is long too. Checked lanes with corrected starts, and cascades."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import nn

from stable_rnn import StableLSTM, Verified
from stable_rnn.plans import step_rounding

from .gpu_table import TINY, Table
from .pretrained import fetch
from .pretrained.networks import NETWORKS, Layer, layers
from .speed import contestants
from .speed.cases import PASSES
from .speed.models import plain_module
from .timing import race

TRAINED = 128, 384  # hidden sizes of the trained LSTMs that are looked at, at least and at most
CORRECTIONS = {"decay": 5.0, "probes": 5.0}  # of lanes' starts, and by how much to beat cuDNN


def chrono(table: Table) -> None:
    """Memories of up to 1000 steps: what an uncorrected warm-up would not reach."""
    for cell, (passes, least) in product(("lstm", "gru"), zip(PASSES, (50.0, 20.0))):
        case = table.case("float16", passes, cell, "chrono", T=65536, H=256)
        found = table.run(case, ["verified"], ["nn"])
        for backend in table.kernels:
            aim = least if backend == table.kernels[0] else None
            name = table.name(case, backend, "chrono, Verified()")
            table.versus(name, found.ours("Verified", backend), found.best("nn"), aim)


def scans(table: Table) -> None:
    """Cascades of 8 groups, scanned over all times at once."""
    for (batch, least), cell in product(((1, 300.0), (32, 10.0)), ("lstm", "gru")):
        case = table.case(cell=cell, model="cascade", T=65536, B=batch, H=256)
        found = table.run(case, ["scanned"], ["nn"])
        for backend in table.kernels:
            aim = least if backend == table.kernels[0] else None
            name = table.name(case, backend, "cascade, Scanned()")
            table.versus(name, found.ours("Scanned", backend), found.best("nn"), aim)


def trained(table: Table) -> None:
    """The trained LSTMs of benchmarks.pretrained whose packages are in its cache, each correction of `Verified`. Where there are none,
    chrono networks of these sizes, and the rows say so."""
    steps = 64 if table.tiny else 32768
    found = list(lstms(table, steps))
    if not found:
        table.note(
            "trained LSTMs", note=f"not measured: no package in {fetch.folder()}; chrono networks in their place"
        )
        found = [synthetic(TINY["H"] if table.tiny else size, steps) for size in (128, 256, 384)]
    for layer in found:
        row_of(table, layer)


def lstms(table: Table, steps: int) -> Iterator[Layer]:
    """Of each package one of each size."""
    seen, here = set(), [name for name in NETWORKS if fetch.cached(name)]
    for layer in layers(steps, here) if here else ():
        if not isinstance(layer, Layer):
            table.note("trained LSTMs", note=f"not measured: {layer}")
            continue
        size = layer.module.hidden_size
        if isinstance(layer.module, nn.LSTM) and TRAINED[0] <= size <= TRAINED[1] and (layer.package, size) not in seen:
            seen.add((layer.package, size))
            yield layer


def synthetic(size: int, steps: int) -> Layer:
    x = torch.rand(steps, 1, size, generator=torch.Generator().manual_seed(size)) * 2 - 1
    return Layer("synthetic", "", "chrono", "1", plain_module("lstm", size, "chrono", torch.float32, "cpu", 0), x)


@torch.no_grad()
def row_of(table: Table, layer: Layer) -> None:
    """float32; every correction beside torch's module, against float64."""
    x, plain = layer.x.to(table.device), layer.module.to(table.device).eval()
    exact = nn.LSTM(plain.input_size, plain.hidden_size, bias=plain.bias).to(x.device, torch.float64)
    exact.load_state_dict(plain.state_dict())
    want = exact(x.double())[0]
    # twice torch's own error, and what jumps between lanes of Verified's own tolerance may add
    allowed = 2 * float((plain(x)[0] - want).abs().max()) + 16 * step_rounding(x)
    runs: dict[str, Callable[[], torch.Tensor]] = {"nn.LSTM": lambda: plain(x)[0]}
    for backend, correct in product(table.kernels, CORRECTIONS):
        m = StableLSTM(plain.input_size, plain.hidden_size, bias=plain.bias, stability=None, backend=backend)
        m.load_state_dict(plain.state_dict())
        m.plan = Verified(correct=correct)
        m = m.to(x.device).eval()
        runs[f"{correct} [{backend}]"] = lambda m=m: m(x)[0]
    rows = {}
    for name, run in runs.items():
        try:
            error = float((run().double() - want).abs().max())
        except Exception as reason:
            table.note(f"{layer.package}, {name}", note=contestants.in_a_line(reason))
            continue
        wrong = None if error <= allowed else f"output error {error:.2g} > {allowed:.2g}"
        rows[name] = {"name": name, "error_of_function": error, "tolerance": allowed, "wrong": wrong}
    times = race({name: runs[name] for name in rows}, table.limits.seconds, device=table.device)
    for name, row in rows.items():
        row["seconds"] = times[name]._asdict()
    for backend, (correct, least) in product(table.kernels, CORRECTIONS.items()):
        name = f"{layer.package}: {layer.network} {layer.layer}, LSTM float32 B1 T{len(x)} H{plain.hidden_size} forward"
        ours, aim = rows.get(f"{correct} [{backend}]"), least if backend == table.kernels[0] else None
        table.versus(f"{name}, Verified(correct={correct}) [{backend}]", ours, rows.get("nn.LSTM"), aim)
