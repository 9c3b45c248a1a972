"""Who is measured: this package's plans on every backend, and an adapter for each baseline. An adapter gives contestants, or says why not.

To add a baseline, write `def name(case, plain, x) -> list[Contestant]` that raises `Unavailable(reason)`, and enter it in `BASELINES`.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stable_rnn
from stable_rnn.plans import Plan, Recurrent, Scanned
from stable_rnn.plans import Verified as VerifiedPlan

from ..baselines import overlap_chunks, shifted_products, unfolded_windows
from .cases import Case, operations
from .models import stable_module

EAGER_STEP = 5e-5  # seconds: no step of a loop in eager torch takes less


class Unavailable(Exception):
    """Why a contestant takes no part."""


@dataclass
class Contestant:
    name: str
    plan: Plan  # whose function it computes, with the same count of operations
    run: Callable[[], Tensor]  # y (T, B, H) of the case's x
    module: nn.Module  # whose gradients it leaves behind
    backend: str | None = None  # of this package; None: a baseline
    answer: str = ""  # of `Truth`: recurrent, windowed, chunked, cut
    threads: int | None = None
    note: str = ""
    bytes: int = 0  # that it is known to need at once
    eager_steps: int = 0  # dependent steps launched one by one from Python

    @property
    def ours(self) -> bool:
        return self.backend is not None

    @property
    def computes(self) -> str:
        return function_of(self.plan)


def function_of(plan: Plan) -> str:
    """What a plan computes."""
    return "recurrent" if isinstance(plan, (VerifiedPlan, Scanned)) else type(plan).__name__.lower()


@dataclass
class Absent:
    name: str
    reason: str


# ---- this package


def backends_of(device: str) -> list[str]:
    """The backends that can run on this device here; `auto` is what a user gets."""
    kinds = {"cpu": ("cpu", "triton", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}[device]
    present = [b.name for b in stable_rnn.backends() if b.available and b.name in kinds]
    if device == "cpu" and "triton" in present and os.environ.get("TRITON_INTERPRET") != "1":
        present.remove("triton")
    return present


def ours(case: Case, plain: nn.RNNBase, x: Tensor, plan: Plan, backend: str) -> Contestant:
    if backend == "torch" and not isinstance(plan, Recurrent):
        raise Unavailable("torch's own recurrence runs Recurrent() only")
    m = stable_module(case.cell, case.H, stability=None, plan=plan, backend=backend)
    m.load_state_dict(plain.state_dict())
    m.to(x.device, x.dtype).train(case.backward)
    answer = function_of(plan)
    made = Contestant(f"{label(plan)} [{backend}]", plan, lambda: m(x)[0], m, backend, answer)
    if backend == "reference":
        made.eager_steps = {"recurrent": case.T, "windowed": case.k, "chunked": case.chunk + case.k}[answer]
        made.bytes = _shifted_bytes(case, x) if answer == "windowed" else 0
    return made


def label(plan: Plan) -> str:
    """`Chunked(256, 32)`, `Verified(chunk=64, warmup=32)`: what the user would write."""
    named = isinstance(plan, VerifiedPlan)
    given = [
        f"{f.name}={getattr(plan, f.name)}" if named else str(getattr(plan, f.name))
        for f in fields(plan)
        if not named or getattr(plan, f.name) != f.default
    ]
    return f"{type(plan).__name__}({', '.join(given)})"


# ---- baselines


def nn_recurrent(case: Case, plain: nn.RNNBase, x: Tensor) -> list[Contestant]:
    """Stock nn.LSTM, nn.GRU, nn.RNN: cuDNN, oneDNN. On the CPU also with one thread: its threads meet at every step."""
    name = f"nn.{type(plain).__name__}"
    made = [Contestant(name, Recurrent(), lambda: plain(x)[0], plain, answer="recurrent")]
    if case.device == "cpu" and torch.get_num_threads() > 1:
        made.append(
            Contestant(f"{name}, one thread", Recurrent(), lambda: plain(x)[0], plain, answer="recurrent", threads=1)
        )
    return made


def unfold(case: Case, plain: nn.RNNBase, x: Tensor) -> list[Contestant]:
    lanes = case.k * case.T * case.B
    size = lanes * case.H * x.element_size() * (2 + case.gates) * (2 if case.backward else 1)
    return [
        Contestant(
            f"unfold + nn.{type(plain).__name__}",
            case.plan("windowed"),
            unfolded_windows(plain, x, case.k),
            plain,
            answer="windowed",
            bytes=size,
        )
    ]


def shifted(case: Case, plain: nn.RNNBase, x: Tensor) -> list[Contestant]:
    return [
        Contestant(
            "shifted GEMMs",
            case.plan("windowed"),
            shifted_products(plain, x, case.k),
            plain,
            answer="windowed",
            bytes=_shifted_bytes(case, x),
            eager_steps=case.k,
        )
    ]


def overlap(case: Case, plain: nn.RNNBase, x: Tensor) -> list[Contestant]:
    try:
        run = overlap_chunks(plain, x, case.chunk, case.k)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    note = "gradient cut at the chunks' starts" if case.backward else ""
    return [
        Contestant(
            f"overlap chunks, nn.{type(plain).__name__}",
            case.plan("chunked"),
            run,
            plain,
            answer="cut" if case.backward else "chunked",
            note=note,
        )
    ]


def _shifted_bytes(case: Case, x: Tensor) -> int:
    rows = case.T * case.B * case.H * x.element_size()
    return rows * (2 * case.gates + 8) * (case.k if case.backward else 1)


def flashrnn(case: Case, plain: nn.RNNBase, x: Tensor, backend: str) -> list[Contestant]:
    """FlashRNN with one head (a dense recurrent matrix), its input projection by one GEMM as ours. It compiles at its first call."""
    if case.device != "cuda" and backend != "vanilla":
        raise Unavailable("GPU only")
    package = _import("flashrnn")
    function = {"lstm": "lstm", "rnn_tanh": "elman"}.get(case.cell)
    if function is None or function == "elman" and backend == "triton_fused":
        raise Unavailable(f"no adapter for its {case.cell}")
    H, G, kind = case.H, case.gates, str(x.dtype).removeprefix("torch.")
    m = copy.deepcopy(plain)
    config = package.FlashRNNConfig(
        head_dim=H,
        num_heads=1,
        batch_size=case.B,
        function=function,
        backend=backend,
        dtype=kind,
        dtype_w=kind,
        dtype_r=kind,
        dtype_b=kind,
        input_shape="TBGHD",
        output_shape="STBHD",
    )

    def run() -> Tensor:
        xp = F.linear(x, m.weight_ih_l0).view(case.T, case.B, G, 1, H)
        r = m.weight_hh_l0.view(G, 1, H, H)
        b = (m.bias_ih_l0 + m.bias_hh_l0).view(G, 1, H)
        return package.flashrnn(xp, r, b, config=config)[0][0].view(case.T, case.B, H)

    return [
        Contestant(
            f"FlashRNN {backend}", Recurrent(), run, m, answer="recurrent", eager_steps=case.T * (backend == "vanilla")
        )
    ]


def haste(case: Case, plain: nn.RNNBase, x: Tensor) -> list[Contestant]:
    if case.device != "cuda":
        raise Unavailable("GPU only (elsewhere it is a Python loop)")
    package = _import("haste_pytorch")
    if case.cell != "lstm":
        raise Unavailable(f"no adapter for its {case.cell}")
    if x.dtype not in (torch.float32, torch.float16):
        raise Unavailable(f"has no {case.dtype}")
    m = package.LSTM(case.H, case.H)
    m.from_native_weights(plain.weight_ih_l0, plain.weight_hh_l0, plain.bias_ih_l0, plain.bias_hh_l0)
    m.train(case.backward)
    return [Contestant("haste", Recurrent(), lambda: m(x)[0], m, answer="recurrent")]


def _import(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is there but broken is absent too, and must not end the run
        raise Unavailable(f"does not import: {in_a_line(error)}") from None


BASELINES: dict[str, Callable[[Case, nn.RNNBase, Tensor], list[Contestant]]] = {
    "nn": nn_recurrent,
    "unfold": unfold,
    "shifted": shifted,
    "overlap": overlap,
    "haste": haste,
    "flashrnn_triton": partial(flashrnn, backend="triton_fused"),
    "flashrnn": partial(flashrnn, backend="cuda_fused"),
}
_COMPUTES = {"unfold": "windowed", "shifted": "windowed", "overlap": "chunked"}  # the others: recurrent


@dataclass(frozen=True)
class Field:
    """Who is asked to take part."""

    plans: tuple[str, ...]
    baselines: tuple[str, ...]
    backends: tuple[str, ...] | None = None  # None: every one present
    without: tuple[str, ...] = ()


def gather(case: Case, plain: nn.RNNBase, x: Tensor, who: Field) -> tuple[list[Contestant], list[Absent]]:
    """Everybody who takes part in a case; x requires grad where the case goes backward."""
    found: list[Contestant] = []
    absent: list[Absent] = []

    def take(name: str, make: Callable[[], list[Contestant]]) -> None:
        try:
            found.extend(make())
        except Unavailable as why:
            absent.append(Absent(name, str(why)))
        except Exception as error:
            absent.append(Absent(name, in_a_line(error)))

    # the recurrent run does not depend on k
    plans = who.plans if case.sweeps != ("k",) else [p for p in who.plans if p in ("windowed", "chunked")]
    functions = {"recurrent" if name == "verified" else name for name in plans}
    for name in who.baselines:
        if name in who.without:
            absent.append(Absent(name, "left out of --quick"))
        elif name == "nn" or _COMPUTES.get(name, "recurrent") in functions:
            take(name, lambda name=name: BASELINES[name](case, plain, x))
    names = ["auto", *backends_of(case.device)] if who.backends is None else who.backends
    for plan in plans:
        for backend in names:
            if who.backends is None and (backend == "torch" or backend == "auto") and plan != "recurrent":
                continue  # torch has no other plan, and there `auto` is one of the others
            made = case.plan(plan)
            if backend in who.without:
                absent.append(Absent(f"{label(made)} [{backend}]", "left out of --quick"))
                continue
            take(f"{label(made)} [{backend}]", lambda made=made, backend=backend: [ours(case, plain, x, made, backend)])
    return found, absent


def too_much(case: Case, who: Contestant, rate: float, longest: float, memory: int) -> str | None:
    """Why a contestant is not even tried: a lower bound of its time, or the memory it is known to need."""
    least = max(operations(case, who.plan) / rate, who.eager_steps * EAGER_STEP * (2 if case.backward else 1))
    if least > longest:
        return f"would take {least:.0f} s or more a call, the limit is {longest:g} s"
    if who.bytes > memory:
        return f"would need {who.bytes / 2**30:.1f} GiB, the limit is {memory / 2**30:.1f} GiB"
    return None


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
