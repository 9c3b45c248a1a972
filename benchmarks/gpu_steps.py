"""Parts of `benchmarks.gpu_targets`: what a training step has besides its recurrence. The spectral projection, resets; and whether the
host waits for the device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from stable_rnn import Certified, StableGRU, StableLSTM, StableRNN
from stable_rnn.functional import SpectralState, spectral_project_

from .gpu_table import Table
from .speed import contestants
from .speed.cases import PASSES
from .timing import race


def waits(run: Callable[[], object]) -> list[str]:
    """What torch says of operations in a call that wait for the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return [str(one.message) for one in said if "synchroniz" in str(one.message)]


def count_waits(table: Table, what: str, run: Callable[[], object]) -> None:
    name = f"{what}: waits for the device in a call"
    if table.device == "cuda":
        table.note(name, value=len(waits(run)), unit="waits", target=0, most=True)
    else:
        table.note(name, target=0, most=True, note="not measured: there is no device to wait for")


def projections(table: Table) -> None:
    """One step of the spectral projection after an update that moves a few singular values across the bound; where the spectrum is flat,
    so that a fifth of them lie at the bound, without a target."""
    for what, count, size, flat in (
        ("4 x 512x512", 4, 512, False),
        ("2 layers x 4 x 1024x1024", 8, 1024, False),
        ("512x512, flat spectrum", 1, 512, True),
    ):
        what, size = (f"{what}, {count} x 16x16", 16) if table.tiny else (what, size)
        draw, bound = torch.Generator().manual_seed(0), 0.99
        state = SpectralState()
        ws = [made(size, flat, draw).to(table.device) for _ in range(count)]
        spectral_project_(ws, bound, state=state)
        start = [w + 1e-3 / size**0.5 * torch.randn(size, size, generator=draw).to(table.device) for w in ws]
        linears = [spectral_norm(nn.Linear(size, size, bias=False, device=table.device)) for _ in range(count)]
        stack = torch.stack(start)

        def project(certify: bool, ws=ws, state=state, start=start, bound=bound) -> None:
            torch._foreach_copy_(ws, start)
            spectral_project_(ws, bound, certify=certify, state=state)

        with torch.no_grad():
            found = race(
                {
                    "update": partial(torch._foreach_copy_, ws, start),
                    "step": partial(project, False),
                    "certified": partial(project, True),
                    "svd": partial(torch.linalg.svd, stack),
                },
                table.limits.seconds,
                device=table.device,
            )
        norms = race(
            {"": lambda linears=linears: [m.weight for m in linears]}, table.limits.seconds / 4, device=table.device
        )[""]
        for name, least_svd, least_norm, most in (("step", 10.0, 5.0, 20.0), ("certified", None, None, 200.0)):
            project(name == "certified")
            largest = float(torch.linalg.matrix_norm(torch.stack(ws).double(), 2).max())
            wrong = (
                f"norm {largest} after a certified projection to {bound}"
                if name == "certified" and not largest <= bound
                else None
            )
            if flat:
                least_svd = least_norm = None
            most = most if count == 4 else None
            called = f"projection, {name}, {what}, time as called"
            seconds = found[name].median - found["update"].median  # the update that a step follows is not its own
            if seconds <= 0:
                for case, target in ((f"projection, {name}, {what}", least_svd), (called, most)):
                    table.note(case, target=target, note=noise(found[name].median, found["update"].median))
                continue
            row = {
                "name": name,
                "seconds": {"median": seconds},
                "error_of_function": max(largest - bound, 0.0),
                "tolerance": None,
                "wrong": wrong,
            }
            for over, time_, least in (
                ("torch.linalg.svd", found["svd"], least_svd),
                ("spectral_norm", norms, least_norm),
            ):
                table.versus(
                    f"projection, {name}, {what}", row, {"name": over, "seconds": time_._asdict(), "wrong": None}, least
                )
            table.value(called, row, lambda row: row["seconds"]["median"] * 1e6, "us", most, True)


def noise(together: float, alone: float) -> str:
    """Why the time of a part has no figure: what it came with took as long without it."""
    return f"not measured: below the noise, {together * 1e6:.1f} us with it and {alone * 1e6:.1f} us without"


def made(size: int, flat: bool, draw: torch.Generator) -> torch.Tensor:
    """Of 2-norm 1 or so: a random matrix, whose largest singular values crowd; or 5 values at 1 and none between that and 0.8."""
    w = torch.randn(size, size, generator=draw) / size**0.5
    if flat:
        return w
    u, _, vh = torch.linalg.svd(w)
    values = torch.linspace(0.8, 0.1, size)
    values[:5] = 1.0
    return (u * values) @ vh


def training(table: Table) -> None:
    """A training step's projection of an LSTM, which goes to the nearest weights, beside the forward and backward pass and the optimizer
    of that step. On a GPU it has products alone: torch's setting for float32 products counts (`torch.set_float32_matmul_precision`)."""
    for size in (256, 1024):
        hidden, batch, steps = (8, 2, 4) if table.tiny else (size, 64, 256)
        torch.manual_seed(0)
        m = StableLSTM(hidden, hidden, stability=Certified()).to(table.device)
        optimizer = torch.optim.Adam(m.parameters(), lr=3e-3)
        x = torch.randn(steps, batch, hidden, device=table.device)

        def step(project: bool, m=m, optimizer=optimizer, x=x) -> None:
            optimizer.zero_grad()
            m(x)[0].square().mean().backward()
            optimizer.step()
            if project:
                m.project_(certify=False)

        runs = {"without": partial(step, False), "with": partial(step, True)}
        found = race(runs, table.limits.seconds, device=table.device)
        without = found["without"].median
        what = f"projection of an LSTM, H{size}, beside a training step of {without * 1e3:.2f} ms"
        share = (found["with"].median - without) / without
        row = {"target": 0.10, "most": True, "unit": ""}
        if share > 0:
            table.note(f"{what}, share of it", value=share, ours_ms=share * without * 1e3, **row)
        else:
            table.note(f"{what}, share of it", note=noise(found["with"].median, without), **row)
        step(True)
        count_waits(table, f"projection of an LSTM, H{size}", partial(m.project_, certify=False))


def _ways(
    table: Table,
    what: str,
    variable: str,
    ways: tuple[str, str],
    run: Callable[[], list[torch.Tensor]],
    judge: Callable[..., dict],
) -> None:
    """One way over the other, as an environment variable chooses them; `judge` looks at what both give."""
    before = os.environ.get(variable)

    def one(way: str) -> list[torch.Tensor]:
        os.environ[variable] = way
        return run()

    runs = {way: partial(one, way) for way in ways}
    try:
        row = judge(*(one() for one in runs.values()))
        found = race(runs, table.limits.seconds, device=table.device)
    except Exception as reason:
        table.note(what, note=contestants.in_a_line(reason))
        return
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before
    table.versus(what, *(row | {"name": way, "seconds": found[way]._asdict()} for way in runs), None)


def exchange(table: Table) -> None:
    """How the blocks of a cluster send each other their states: by transactions, over by the barrier, which is the default."""
    kind, backend = torch.float32 if table.tiny else torch.float16, table.kernels[0]

    def judge(one: list[torch.Tensor], two: list[torch.Tensor]) -> dict:
        same = all(map(torch.equal, one, two))
        return {
            "error_of_function": 0.0,
            "tolerance": 0.0,
            "wrong": None if same else "other bits than the barrier's",
        }

    for batch, size in ((1, 256), (16, 512), (64, 256)):
        steps, batch, size = (48, 3, 8) if table.tiny else (2048, batch, size)
        m = StableLSTM(size, size, stability=None, backend=backend).to(table.device, kind)
        x = (torch.rand(steps, batch, size, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(table.device, kind)

        def run(backward: bool, m=m, x=x) -> list[torch.Tensor]:
            m.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(backward):
                y = m(x)[0]
                if backward:
                    y.sum().backward()
            return [y.detach(), *(p.grad.clone() for p in m.parameters() if backward)]

        for passes in PASSES:
            what = f"LSTM {str(kind).removeprefix('torch.')} exchange B{batch} T{steps} H{size} {passes} [{backend}]"
            ways = ("transactions", "barrier")
            _ways(table, what, "STABLE_RNN_EXCHANGE", ways, partial(run, passes != PASSES[0]), judge)


def products(table: Table) -> None:
    """The products of many lanes: by wgmma, which an H100 has, over by mma, which is the default."""
    kind, backend = torch.float32 if table.tiny else torch.float16, table.kernels[0]
    for batch, size in ((512, 256), (512, 512), (4096, 256)):
        steps, batch, size = (48, 3, 8) if table.tiny else (128, batch, size)
        weights = StableLSTM(size, size, stability=None).state_dict()

        def made(backend: str, kind: torch.dtype, size=size, weights=weights) -> nn.Module:
            m = StableLSTM(size, size, stability=None, backend=backend)
            m.load_state_dict(weights)
            return m.to(table.device, kind)

        m = made(backend, kind)
        x = (torch.rand(steps, batch, size, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(table.device, kind)
        some = x[:, :16]
        with torch.no_grad():
            exact = made("reference", torch.float64)(some.double())[0]
            eager = made("reference", kind)(some)[0]
        allowed = 2 * float((eager.double() - exact).abs().max()) + torch.finfo(kind).eps

        def judge(*both: list[torch.Tensor], exact=exact, allowed=allowed) -> dict:
            error = max(float((y[:, :16].double() - exact).abs().max()) for (y,) in both)
            wrong = None if error <= allowed else f"output error {error:.2g} > {allowed:.2g}"
            return {"error_of_function": error, "tolerance": allowed, "wrong": wrong}

        def run(m=m, x=x) -> list[torch.Tensor]:
            with torch.no_grad():
                return [m(x)[0]]

        what = f"LSTM {str(kind).removeprefix('torch.')} product B{batch} T{steps} H{size} {PASSES[0]} [{backend}]"
        _ways(table, what, "STABLE_RNN_PRODUCT", ("wgmma", "mma"), run, judge)


def resets(table: Table) -> None:
    """Rows that begin anew about every 100 steps: time over that without a mask, and no wait for the number of pieces."""
    size, steps, batch = (8, 48, 3) if table.tiny else (256, 1024, 16)
    draw, kind = torch.Generator().manual_seed(0), torch.float32 if table.tiny else torch.float16
    x = (torch.rand(steps, batch, size, generator=draw) * 2 - 1).to(table.device, kind)
    mask = (torch.rand(steps, batch, generator=draw) < 0.01).to(table.device)
    for cls in (StableRNN, StableLSTM, StableGRU):
        weights = cls(size, size, stability=None).state_dict()

        def made(backend: str, kind: torch.dtype, cls=cls, weights=weights) -> nn.Module:
            m = cls(size, size, stability=None, backend=backend)
            m.load_state_dict(weights)
            return m.to(table.device, kind)

        with torch.no_grad():
            exact = made("reference", torch.float64)(x.double(), resets=mask)[0]
            eager = made("reference", kind)(x, resets=mask)[0]
        allowed = 2 * float((eager.double() - exact).abs().max()) + torch.finfo(kind).eps
        for backend in table.kernels:
            m = made(backend, kind)

            def step(resets: torch.Tensor | None, m=m) -> torch.Tensor:
                m.zero_grad(set_to_none=True)
                y = m(x, resets=resets)[0]
                y.sum().backward()
                return y

            name = f"{m.mode} {str(kind).removeprefix('torch.')} resets B{batch} T{steps} H{size} [{backend}]"
            try:
                error = float((step(mask).detach().double() - exact).abs().max())
                found = race(
                    {"with": partial(step, mask), "without": partial(step, None)},
                    table.limits.seconds,
                    device=table.device,
                )
            except Exception as reason:
                table.note(name, note=contestants.in_a_line(reason))
                continue
            wrong = None if error <= allowed else f"output error {error:.2g} > {allowed:.2g}"
            row = {"error_of_function": error, "tolerance": allowed}
            ours, plain = (
                row | {"name": who, "seconds": found[key]._asdict(), "wrong": wrong}
                for who, key in (("with a mask", "with"), ("without one", "without"))
            )
            table.versus(f"{name}, forward+backward", ours, plain, None)
            count_waits(table, name, partial(step, mask))
