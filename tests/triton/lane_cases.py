"""Runs the backend on a `lane_loop.Case` with poisoned outputs, and holds what it writes against the plain loops."""

import lane_loop as loop
import torch

from stable_rnn.ops.recurrence import triton as backend
from stable_rnn.ops.recurrence.problem import Adjoint, BackwardInputs, Inputs, Output, Problem
from stable_rnn.precision import TF32_EPS, TF32X3_EPS, tf32x3_asked

DEVICE = "cuda" if torch.cuda.is_available() and not backend.interpreted() else "cpu"

WAYS = ("small", "large", "team")


def divide(way, monkeypatch):
    """`small`: a program has its lanes and all of W; `large`: it walks over the units; `team`: three programs do, for each tile."""
    table, device_of = backend.config, backend.device_of

    def config(backward, cell, dtype, hidden, windows, device):
        found = table(backward, cell, dtype, hidden, windows, device)
        if way == "small":
            return found._replace(small=True, units=max(16, 1 << (hidden - 1).bit_length()))
        units = 16 if way == "team" else found.units if not found.small else 32
        return found._replace(small=False, units=units, inner=16 if found.small else found.inner)

    monkeypatch.setattr(backend, "config", config)
    monkeypatch.setattr(backend, "device_of", lambda x: device_of(x)._replace(programs=1 if way == "large" else 12))


def problem(case) -> Problem:
    return Problem(case.cell, case.steps, case.step, case.stride, case.warmup, cap=case.cap).resolved()


def to_device(values):
    return None if values is None else torch.as_tensor(values, device=DEVICE)


def rows(case):
    """base, lengths and resets."""
    return to_device(None if case.plain_base else case.base), to_device(case.lengths), to_device(case.anew)


def _poisoned(case, kind, wide, **columns):
    """An `Output` or `Adjoint` full of NaN; float32 where `wide`. A field without columns is empty."""
    count = {"h_n": case.batch, "c_n": case.batch, "dh0": case.batch, "dc0": case.batch}
    made = {}
    for name in kind._fields:
        long = case.lanes if name.endswith(("start", "end", "decay")) else count.get(name, case.n)
        shape = (long, columns[name]) if columns.get(name) else (0,)
        made[name] = torch.full(shape, loop.NAN, dtype=torch.float32 if name in wide else case.dtype, device=DEVICE)
    return kind(**made)


def forward(case, made) -> dict:
    H, C, S = case.hidden, case.hidden * case.lstm, case.hidden * case.forgets
    out = _poisoned(
        case,
        Output,
        ("cells", "h_start", "c_start", "h_end", "c_end", "decay"),
        y=H,
        h_n=H,
        c_n=C,
        saved=4 * S,
        cells=C,
        h_start=H,
        c_start=C,
        h_end=H,
        c_end=C,
        decay=S,
    )
    on = {name: to_device(value) for name, value in made.items()}
    backend.forward(
        Inputs(on["xp"], on["w_hh"], None, on["hidden_bias"], on["h0"], on["c0"], *rows(case)),
        problem(case),
        borders=True,
        ids=to_device(case.select),
        h_init=on.get("h_init"),
        c_init=on.get("c_init") if case.lstm else None,
        out=out,
    )
    return {name: t.cpu() for name, t in out._asdict().items() if t.dim() == 2}


def backward(case, made, saved) -> dict:
    H, C, S = case.hidden, case.hidden * case.lstm, case.hidden * case.forgets
    out = _poisoned(
        case,
        Adjoint,
        ("dh_start", "dc_start", "dh_end", "dc_end", "decay"),
        dz=case.gates * H,
        dh0=H,
        dc0=C,
        dh_start=H,
        dc_start=C,
        dh_end=H,
        dc_end=C,
        decay=S,
    )
    on = {name: to_device(value) for name, value in (made | saved).items()}
    empty = torch.empty(0, device=DEVICE)
    kept = on["y"], on.get("saved", empty), on.get("cells", empty)
    ends = on["dh_n"], on["dc_n"] if case.lstm else None
    before = on["h0"] if case.gru else None, on["c0"]
    backend.backward(
        BackwardInputs(on["dy"], *ends, *kept, on["w_hh"], None, *before, *rows(case)),
        problem(case),
        borders=True,
        ids=to_device(case.select),
        dh_init=on.get("h_init"),
        dc_init=on.get("c_init") if case.lstm else None,
        out=out,
    )
    return {name: t.cpu() for name, t in out._asdict().items() if t.dim() == 2}


def ends(case, made, only) -> dict:
    """`ends` of the backend; `only` is all that it gives."""
    on = {name: to_device(value) for name, value in made.items()}
    inputs = Inputs(on["xp"], on["w_hh"], None, on["hidden_bias"], on["h0"], on["c0"], *rows(case))
    found = backend.ends(inputs, problem(case), on["h_init"], on["c_init"] if case.lstm else None)
    return {name: t.cpu() for name, t in zip(only, found, strict=True) if t.numel()}


def adjoint_ends(case, made, saved, only) -> dict:
    on = {name: to_device(value) for name, value in (made | saved).items()}
    kept = on["y"], on.get("saved"), on.get("cells")
    before = on["h0"] if case.gru else None, on["c0"]
    inputs = BackwardInputs(on["dy"], None, None, *kept, on["w_hh"], None, *before, *rows(case))
    found = backend.adjoint_ends(inputs, problem(case), on["h_init"], on["c_init"] if case.lstm else None)
    return {name: t.cpu() for name, t in zip(only, found, strict=True) if t.numel()}


def assert_like(found: dict, exact: dict, eager: dict, case, terms: int) -> None:
    """Every tensor of `found`: NaN exactly where the oracle is; else at most twice eager's error plus rounding terms: one unit of the
    storage type; and for each of a lane's steps the float32 rounding of a sum of `terms` products (growing like a random walk) and what
    its inputs were rounded by, a unit of a 16-bit type, 2^-11 relative each for the two factors of TF32, or 2^-20 for three products of
    TF32. The weights have variance 1 / hidden and rounding errors have random signs, so a sum errs by sqrt(terms / hidden) times that,
    relative to the state."""
    assert found.keys() == exact.keys()
    steps = min(case.stride + case.warmup, case.steps)
    inputs = torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 0.0
    if case.dtype == torch.float32 and DEVICE == "cuda":
        inputs = TF32_EPS if case.tf32 else TF32X3_EPS if tf32x3_asked() else 0.0
    for name, value in found.items():
        want, plain = exact[name], eager[name]
        assert value.shape == want.shape, name
        written = ~want.isnan()
        assert torch.equal(~value.isnan(), written), f"{name}: the wrong elements were written"
        if not written.any():
            continue
        scale = max(1.0, float(want[written].abs().max()))
        sums = torch.finfo(torch.float32).eps * (steps * (terms + 8)) ** 0.5
        rounding = torch.finfo(value.dtype).eps + sums + inputs * steps * (terms / case.hidden) ** 0.5
        allowed = 2 * float((plain.double() - want)[written].abs().max()) + scale * rounding
        error = float((value.double() - want)[written].abs().max())
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


def check(case, saved=None) -> tuple[dict, dict]:
    """Forward, and backward over `saved`, by default what the forward saved."""
    made = case.draw()
    found = forward(case, made)
    assert_like(found, loop.loop_forward(case, made), loop.loop_forward(case, made, torch.float32), case, case.hidden)
    saved = {name: (found if saved is None else saved)[name] for name in ("y", "saved", "cells") if name in found}
    back = backward(case, made, saved)
    exact, eager = (
        {name: t for name, t in loop.loop_backward(case, made, saved, kind).items() if name != "dh"}
        for kind in (torch.float64, torch.float32)
    )
    assert_like(back, exact, eager, case, case.gates * case.hidden)
    return found, back
