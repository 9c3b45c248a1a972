"""params.h in two forms for test_native_recurrence.py and test_cuda_recurrence.py: as a call of compiled kernels on poisoned tensors, and
as plain loops.

The loops take one lane and one step at a time. In float64 they are the oracle; in float32 they say what error eager torch makes.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from stable_rnn import _native

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
CAPPED = ("lstm", "gru")  # cells with a gate that forgets
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TF32, BF16_WEIGHTS, BF16X3 = 3, 5, 6
NAN = float("nan")


def instruction_sets():
    """Those of this machine that the kernels are compiled for."""
    if not _native.lib:
        return ["plain"]
    found, mine = [], _native.lib.cpu_features()["isa"]
    for name in ("plain", "avx2", "avx512", "avx512bf16", "amx"):
        with suppress(ValueError):
            _native.lib.set_isa(name)
            found.append(name)
    _native.lib.set_isa(mine)
    return found


@dataclass
class Case:
    """One problem: sizes, lanes, and where the rows of the batch lie (`base`, `length`, `step` of params.h)."""

    cell: str
    steps: int
    batch: int
    hidden: int
    stride: int
    warmup: int
    out: int | None = None
    cap: float = 1.0
    dtype: torch.dtype = torch.float32
    layout: str = "padded"  # padded | reverse | packed | packed_reverse | shared
    lengths: tuple[int, ...] | None = None
    resets: float | tuple[int, ...] | None = (
        None  # buffer rows before whose steps the state is zero, or their part; None: no mask
    )
    select: tuple[int, ...] | None = None
    init: bool = False
    threads: int = 1
    tf32: bool = False  # products of float32 rounded to TF32
    bf16_weights: bool = False  # state weights of float32 rounded to bfloat16
    bf16x3: bool = False  # products of float32 as three of bfloat16, where kernels have them
    device: str = "cpu"  # where kernels run; the loops run on the CPU

    def __post_init__(self):
        self.lstm, self.gru = self.cell == "lstm", self.cell == "gru"
        self.forgets = self.lstm or self.gru
        self.gates = 4 if self.lstm else 3 if self.gru else 1
        self.p = self.out or self.hidden
        used = list(self.lengths or [self.steps] * self.batch)
        self.length = used
        if self.layout.startswith("packed"):
            self.n = sum(used)
            first = [sum(used[:b]) for b in range(self.batch)]
            back = self.layout == "packed_reverse"
            self.step = -1 if back else 1
            self.base = [first[b] + (used[b] - 1 if back else 0) for b in range(self.batch)]
        elif self.layout == "shared":  # two rows of the batch over the same times
            self.n, self.step = -(-self.batch // 2) * self.steps, 1
            self.base = [b // 2 * self.steps for b in range(self.batch)]
        else:
            self.n = self.steps * self.batch
            back = self.layout == "reverse"
            self.step = -self.batch if back else self.batch
            self.base = [(used[b] - 1) * self.batch + b if back else b for b in range(self.batch)]
        self.plain_base = self.lengths is None and self.layout in ("padded", "reverse")
        self.anew = None
        if isinstance(self.resets, tuple):
            self.anew = torch.zeros(self.n, dtype=torch.bool)
            self.anew[list(self.resets)] = True
        elif self.resets is not None:
            self.anew = torch.rand(self.n, generator=torch.Generator().manual_seed(self.n)) < self.resets
        self.lanes = -(-self.steps // self.stride) * self.batch
        self.ids = list(range(self.lanes) if self.select is None else self.select)

    def row(self, b, t):
        return self.base[b] + t * self.step

    def begins_anew(self, row):
        return self.anew is not None and bool(self.anew[row])

    def span(self, id):
        """Row of the batch, first written time, end of the written times."""
        b, first = id % self.batch, id // self.batch * self.stride
        return b, first, min(first + self.stride, self.length[b])

    def draw(self, seed=0):
        """Inputs in the storage type; gradients of the outputs too."""
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: torch.randn(*shape, generator=g).to(self.dtype)  # noqa: E731
        H, P, G = self.hidden, self.p, self.gates
        made = dict(xp=rand(self.n, G * H), w_hh=rand(G * H, P) / max(P, 1) ** 0.5)
        made |= dict(w_hr=rand(P, H) / max(H, 1) ** 0.5 if self.out else None)
        made |= dict(h0=rand(self.batch, P), c0=rand(self.batch, H) if self.lstm else None)
        made |= dict(dy=rand(self.n, P), dh_n=rand(self.batch, P), dc_n=rand(self.batch, H))
        made |= dict(hidden_bias=rand(H) if self.gru else None)
        if self.init:
            made |= dict(h_init=rand(len(self.ids), P).float(), c_init=rand(len(self.ids), H).float())
        return made


def step(case, to, x, h, c):
    """One step of one lane: h before it is rounded, c, what is saved, m."""
    q, w_hr = to["w_hh"] @ h, to["w_hr"]
    if case.gru:
        (x_r, x_z, x_n), (q_r, q_z, q_n) = x.chunk(3), q.chunk(3)
        r, z, q_n = torch.sigmoid(x_r + q_r), torch.sigmoid(x_z + q_z).clamp(max=case.cap), q_n + to["hidden_bias"]
        n = torch.tanh(x_n + r * q_n)
        return (1 - z) * n + z * h, c, torch.cat([r, z, n, q_n]), c
    z = x + q
    if not case.lstm:
        return (torch.tanh(z) if case.cell == "rnn_tanh" else torch.relu(z)), c, None, c
    i, f, g, o = z.chunk(4)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f).clamp(max=case.cap), torch.tanh(g), torch.sigmoid(o)
    c = f * c + i * g
    m = o * torch.tanh(c)
    return (m if w_hr is None else w_hr @ m), c, torch.cat([i, f, g, o]), m


def loop_forward(case, made, kind=torch.float64):
    """All outputs of ForwardParams; rows that no lane writes stay NaN."""
    full = lambda *shape: torch.full(shape, NAN, dtype=kind)  # noqa: E731
    H, P = case.hidden, case.p
    to = {k: None if v is None else v.to(kind) for k, v in made.items()}
    out = dict(
        y=full(case.n, P),
        h_n=full(case.batch, P),
        c_n=full(case.batch, H),
        saved=full(case.n, 4 * H),
        cells=full(case.n, H),
        h_start=full(case.lanes, P),
        c_start=full(case.lanes, H),
        h_end=full(case.lanes, P),
        c_end=full(case.lanes, H),
        decay=full(case.lanes, H),
    )
    for b in range(case.batch):
        if case.length[b] == 0:
            out["h_n"][b], out["c_n"][b] = to["h0"][b], to["c0"][b] if case.lstm else NAN
    for entry, id in enumerate(case.ids):
        b, first, end = case.span(id)
        if first >= end:
            continue
        begin = first if case.init else max(0, first - case.warmup)
        if case.init:
            h, c = to["h_init"][entry], to["c_init"][entry]
        elif first - case.warmup <= 0:
            h, c = to["h0"][b], to["c0"][b] if case.lstm else None
        else:
            h, c = torch.zeros(P, dtype=kind), torch.zeros(H, dtype=kind)
        for t in range(begin, end):
            if t == first:
                out["h_start"][id] = h
                if case.lstm:
                    out["c_start"][id] = c
            row = case.row(b, t)
            anew = case.begins_anew(row)
            if anew:
                h, c = torch.zeros_like(h), torch.zeros_like(c) if case.lstm else None
            h, c, saved, _ = step(case, to, to["xp"][row], h, c)
            h = h.to(case.dtype).to(kind) if kind == torch.float32 else h
            if t >= first:
                out["y"][row] = h
                if case.lstm:
                    out["cells"][row] = c
                if case.forgets:
                    out["saved"][row] = saved
                    so_far = 0 if anew else 1 if t == first else out["decay"][id]
                    out["decay"][id] = saved.chunk(4)[1] * so_far
        for name, state in (("h", h), ("c", c if case.lstm else None)):
            if state is not None:
                out[f"{name}_end"][id] = state
                if end == case.length[b]:
                    out[f"{name}_n"][b] = state
    absent = () if case.lstm else ("c_n", "cells", "c_start", "c_end")
    absent += () if case.forgets else ("saved", "decay")
    return {k: v for k, v in out.items() if k not in absent}


def vjp(case, dh, dc, h, saved, c, h_prev, c_prev, w_hr, cap):
    """Of one step of one lane: the adjoints of x, of the hidden product, of h_prev without that product, and of c_prev."""
    none = torch.zeros_like(dh)
    if case.cell == "rnn_tanh":
        dz = dh * (1 - h * h)
        return dz, dz, none, dc
    if case.cell == "rnn_relu":
        dz = torch.where(h > 0, dh, 0.0)
        return dz, dz, none, dc
    if case.gru:
        r, z, n, q_n = saved.chunk(4)
        dn = dh * (1 - z) * (1 - n * n)
        du = dh * (h_prev - n) * z * (1 - z)
        du = torch.where(z >= cap, 0.0, du) if cap < 1 else du
        dr = dn * q_n * r * (1 - r)
        return torch.cat([dr, du, dn]), torch.cat([dr, du, dn * r]), dh * z, dc
    i, f, g, o = saved.chunk(4)
    dm = dh if w_hr is None else dh @ w_hr
    tanh = torch.tanh(c)
    dc = dc + dm * o * (1 - tanh * tanh)
    df = dc * c_prev * f * (1 - f)
    df = torch.where(f >= cap, 0.0, df) if cap < 1 else df
    dz = torch.cat([dc * g * i * (1 - i), df, dc * i * (1 - g * g), dm * tanh * o * (1 - o)])
    return dz, dz, none, dc * f


def loop_backward(case, made, saved, kind=torch.float64):
    """All outputs of BackwardParams, over what the kernel saved (so that both start from the same numbers)."""
    full = lambda *shape: torch.full(shape, NAN, dtype=kind)  # noqa: E731
    H, P = case.hidden, case.p
    to = {k: None if v is None else v.to(kind) for k, v in (made | saved).items()}
    cap = float(torch.tensor(case.cap, dtype=case.dtype))
    out = dict(
        dz=full(case.n, case.gates * H),
        dh=full(case.n, P),
        dh0=full(case.batch, P),
        dc0=full(case.batch, H),
        dh_start=full(case.lanes, P),
        dc_start=full(case.lanes, H),
        dh_end=full(case.lanes, P),
        dc_end=full(case.lanes, H),
        decay=full(case.lanes, H),
    )
    for b in range(case.batch):
        if case.length[b] == 0:
            out["dh0"][b], out["dc0"][b] = to["dh_n"][b], to["dc_n"][b]
    for entry, id in enumerate(case.ids):
        b, first, end = case.span(id)
        if first >= end:
            continue
        begin = end if case.init else min(case.length[b], end + case.warmup)
        if case.init:
            dh, dc = to["h_init"][entry], to["c_init"][entry]
        elif begin == case.length[b]:
            dh, dc = to["dh_n"][b], to["dc_n"][b]
        else:
            dh, dc = torch.zeros(P, dtype=kind), torch.zeros(H, dtype=kind)
        for t in reversed(range(first, begin)):
            row = case.row(b, t)
            anew = case.begins_anew(row)
            if t == end - 1:
                out["dh_start"][id], out["dc_start"][id] = dh, dc
            dh = dh + to["dy"][row]
            if t < end:
                out["dh"][row] = dh
            state = dict(h=to["y"][row], saved=None, c=None, h_prev=None, c_prev=None)
            if case.forgets:
                state |= dict(saved=to["saved"][row])
            if case.gru:
                state |= dict(h_prev=to["y"][case.row(b, t - 1)] if t else to["h0"][b])
            if case.lstm:
                state |= dict(
                    c=to["cells"][row],
                    c_prev=to["cells"][case.row(b, t - 1)] if t else to["c0"][b],
                )
            if anew:
                state |= {k: torch.zeros_like(v) for k, v in state.items() if k.endswith("_prev") and v is not None}
            if case.forgets and t < end:
                so_far = 0 if anew else 1 if t == end - 1 else out["decay"][id]
                out["decay"][id] = state["saved"].chunk(4)[1] * so_far
            dz, dq, dh, dc = vjp(case, dh, dc, **state, w_hr=to["w_hr"], cap=cap)
            if t < end:
                out["dz"][row] = dz
            dh = dh + dq @ to["w_hh"]
            if anew:
                dh, dc = torch.zeros_like(dh), torch.zeros_like(dc)
        out["dh_end"][id], out["dc_end"][id] = dh, dc
        if first == 0:
            out["dh0"][b], out["dc0"][b] = dh, dc
    dropped = () if case.lstm else ("dc0", "dc_start", "dc_end")
    dropped += () if case.forgets else ("decay",)
    return {k: v for k, v in out.items() if k not in dropped}


def loop_windowed(case, made, first, last, kind=torch.float64):
    """All outputs of WindowedBackwardParams for one group of lanes."""
    H, P, k, GH = case.hidden, case.p, case.warmup + 1, case.gates * case.hidden
    zeros = lambda *shape: torch.zeros(*shape, dtype=kind)  # noqa: E731
    to = {name: None if v is None else v.to(kind) for name, v in made.items()}
    rows = (last - first) * k
    out = dict(dz=zeros(rows, GH), d_hidden=zeros(rows, GH), h_prev=zeros(rows, P), dh=zeros(rows, P), m=zeros(rows, H))
    out |= dict(dxp=zeros(case.n, GH), dh0=zeros(case.batch, P), dc0=zeros(case.batch, H))
    for id in range(first, last):
        b, t, end = case.span(id)
        if t >= end:
            continue
        begin = max(0, t - k + 1)
        given = t - case.warmup <= 0
        h, c = (to["h0"][b], to["c0"][b] if case.lstm else zeros(H)) if given else (zeros(P), zeros(H))
        steps = []
        for time in range(begin, t + 1):
            at = (id - first) * k + k - 1 - (t - time)
            out["h_prev"][at] = h
            h_new, c_new, saved, m = step(case, to, to["xp"][case.row(b, time)], h, c)
            h_new = h_new.to(case.dtype).to(kind) if kind == torch.float32 else h_new
            out["m"][at] = m
            steps.append((time, at, dict(h=h_new, saved=saved, c=c_new, h_prev=h, c_prev=c)))
            h, c = h_new, c_new
        ends = t == case.length[b] - 1
        dh = to["dy"][case.row(b, t)] + (to["dh_n"][b] if ends else 0)
        dc = to["dc_n"][b] if ends else zeros(H)
        for time, at, state in reversed(steps):
            out["dh"][at] = dh
            found = vjp(case, dh, dc, **state, w_hr=to["w_hr"], cap=case.cap)
            out["dz"][at], out["d_hidden"][at], dh, dc = found
            out["dxp"][case.row(b, time)] += out["dz"][at]
            dh = dh + out["d_hidden"][at] @ to["w_hh"]
        if given:
            out["dh0"][b] += dh
            out["dc0"][b] += dc
    if not case.out:
        del out["dh"], out["m"]
    if not case.lstm:
        del out["dc0"]
    if not case.gru:
        del out["d_hidden"]
    return out


def at(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _head(case):
    """The arguments up to the selection; the tensors behind the addresses are kept on the case."""
    tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=case.device)  # noqa: E731
    case.kept = [
        None if case.plain_base else tensor(case.base),
        None if case.lengths is None else tensor(case.lengths),
        None if case.anew is None else case.anew.to(case.device),
        None if case.select is None else tensor(case.select),
    ]
    return (
        CELLS.index(case.cell),
        TF32 if case.tf32 else BF16_WEIGHTS if case.bf16_weights else BF16X3 if case.bf16x3 else DTYPES[case.dtype],
        case.threads,
        case.hidden,
        case.p,
        case.cap,
        case.steps,
        case.batch,
        case.step,
        case.stride,
        case.warmup,
        *map(at, case.kept),
        0 if case.select is None else len(case.select),
    )


def _poisoned(case, **columns):
    """name=(rows, columns, dtype) -> tensors full of NaN."""
    return {k: torch.full(v[:2], NAN, dtype=v[2], device=case.device) for k, v in columns.items()}


def _call(case, kernel, inputs, outputs, only):
    """`kernel` on the case's device; the outputs on the CPU: all, or those that alone are asked for."""
    outputs = {k: v for k, v in outputs.items() if only is None or k in only}
    there = [None if t is None else t.to(case.device) for t in inputs]
    kernel(*_head(case), *map(at, there), **{k: at(v) for k, v in outputs.items()})
    return {k: v.cpu() for k, v in outputs.items()}


def run_forward(case, made, call=None, only=None):
    """`call`: takes the arguments of `recurrence_forward`; None: the compiled module's. `only`: names of outputs; None: all."""
    H, P, n, batch, dtype, f32 = case.hidden, case.p, case.n, case.batch, case.dtype, torch.float32
    out = _poisoned(
        case, y=(n, P, dtype), h_n=(batch, P, dtype), h_start=(case.lanes, P, f32), h_end=(case.lanes, P, f32)
    )
    if case.lstm:
        out |= _poisoned(
            case,
            c_n=(batch, H, dtype),
            cells=(n, H, f32),
            c_start=(case.lanes, H, f32),
            c_end=(case.lanes, H, f32),
        )
    if case.forgets:
        out |= _poisoned(case, saved=(n, 4 * H, dtype), decay=(case.lanes, H, f32))
    names = ("xp", "w_hh", "w_hr", "h0", "c0", "h_init", "c_init", "hidden_bias")
    return _call(case, call or _native.lib.recurrence_forward, [made.get(k) for k in names], out, only)


def run_backward(case, made, saved, call=None, only=None):
    H, P, n, batch, dtype, f32 = case.hidden, case.p, case.n, case.batch, case.dtype, torch.float32
    out = _poisoned(
        case,
        dz=(n, case.gates * H, dtype),
        dh=(n, P, dtype),
        dh0=(batch, P, dtype),
        dh_start=(case.lanes, P, f32),
        dh_end=(case.lanes, P, f32),
    )
    if case.lstm:
        out |= _poisoned(case, dc0=(batch, H, dtype), dc_start=(case.lanes, H, f32), dc_end=(case.lanes, H, f32))
    if case.forgets:
        out |= _poisoned(case, decay=(case.lanes, H, f32))
    both = made | saved | dict(dh_init=made.get("h_init"), dc_init=made.get("c_init"))
    names = ("dy", "y", "saved", "cells", "w_hh", "w_hr", "c0", "dh_n", "dc_n", "dh_init", "dc_init", "h0")
    return _call(case, call or _native.lib.recurrence_backward, [both.get(k) for k in names], out, only)


def run_windowed(case, made, first, last):
    k, f32 = case.warmup + 1, torch.float32
    rows, sums = (last - first) * k, case.gates * case.hidden
    out = _poisoned(case, dz=(rows, sums, f32), h_prev=(rows, case.p, f32))
    if case.out:
        out |= _poisoned(case, dh=(rows, case.p, f32), m=(rows, case.hidden, f32))
    out |= dict(dxp=torch.zeros(case.n, sums), dh0=torch.zeros(case.batch, case.p))
    if case.lstm:
        out["dc0"] = torch.zeros(case.batch, case.hidden)
    if case.gru:
        out |= _poisoned(case, d_hidden=(rows, sums, f32))
    names = ("xp", "w_hh", "w_hr", "h0", "c0", "dy", "dh_n", "dc_n", "hidden_bias")
    inputs = (at(made[k]) for k in names)
    _native.lib.recurrence_windowed_backward(*_head(case), first, last, *inputs, **{k: at(v) for k, v in out.items()})
    return out


def with_lanes(case, select, init=None):
    return replace(case, select=None if select is None else tuple(select), init=case.init if init is None else init)


def ends_alone(case, forward=run_forward, backward=run_backward):
    """Rows over the same times (layout "shared"), each from a start of its own, of which nothing but the ends is asked for: what kernels,
    the oracle and eager float32 make of these, forward and then backward. h0, c0 and dy are absent."""
    known = replace(case, layout="packed", batch=-(-case.batch // 2), init=False)
    known = replace(known, lengths=(case.steps,) * known.batch)
    saved = forward(known, known.draw())
    made = case.draw()
    silent, names = made | dict(dy=torch.zeros_like(made["dy"])), ("h_end", "c_end")
    back_names = tuple("d" + name for name in names)
    found = forward(case, made | dict(h0=None, c0=None), only=names)
    found_back = backward(case, made | dict(dy=None, dh_n=None, dc_n=None), saved, only=back_names)
    loops = [loop_forward(case, made, kind) for kind in (torch.float64, torch.float32)]
    loops_back = [loop_backward(case, silent, saved, kind) for kind in (torch.float64, torch.float32)]
    pick = lambda every: {k: v for k, v in every.items() if k in names + back_names}  # noqa: E731
    return (found, *map(pick, loops)), (found_back, *map(pick, loops_back))
