"""What a stable set costs: held-out loss beside the certified rate and window, of every set that was tried, losers included.

    python -m benchmarks.sets                         trains what is missing in results/sets/, then prints the table
    python -m benchmarks.sets lstm/plain rnn/plain    these alone;  --seeds 1 2 3;  --text FILE;  --table: trains nothing

A character model (embedding of 32 through tanh, one layer of `--hidden` units, a linear read-out) on the first 2 million characters of
Penn Treebank, or on nine tenths of a text of yours; 1000 steps of Adam at 1e-2 with a cosine, 16 stretches of 64 characters each,
gradient norm clipped at 1, the same stretches for every set. Held out: 128 rows of 1024 characters, each from a zero state."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from stable_rnn import Cascade, Certified, ForgetCap, StableGRU, StableLSTM, StableRNN
from stable_rnn._errors import UserError
from stable_rnn.ops.spectral import row_project_, spectral_norm_bound
from stable_rnn.stability import Stability
from stable_rnn.stability.cascade import borders
from stable_rnn.stability.cells import STABILITY
from stable_rnn.stability.weights import layer_names

from .jsonl import Log

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "sets"
DATA = ROOT.parent / "shared" / "data" / "ptb"
ROWS, ROW = 128, 1024
BATCH, STRETCH = 16, 64


# ---- sets that lost


class Metric(Certified):
    """The LSTM's set of `Certified`, its training steps projected in another metric: singular direction by singular direction, row r of
    W_hh is divided by 1 + mu d_r^exponent. 2 is the Euclidean one (the library's), 0 clips the singular values of D W_hh.

    balanced: with a diagonal E between the units, ||(E D) W_hh E^-1||_2 <= rate, by Osborne's method at each step."""

    def __init__(self, exponent: float, balanced: bool = False, **options) -> None:
        super().__init__(**options)
        object.__setattr__(self, "exponent", exponent)
        object.__setattr__(self, "e", torch.ones(1) if balanced else None)

    def project_(self, module: nn.Module, certify: bool = True) -> None:
        if certify and self.e is None:
            return super().project_(module)
        with torch.no_grad():
            weights = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
            names = layer_names(module)[0][0]
            ((w, scales, bound),) = STABILITY["lstm"].balls(weights, names, self, 0.0)
            rows = torch.tensor(scales).repeat_interleave(module.hidden_size)[:, None]
            e = (
                torch.ones(module.hidden_size)
                if self.e is None
                else balance(rows * w, self.e.expand(module.hidden_size))
            )
            rows, true, w = rows * e.repeat(4)[:, None], w, w / e
            object.__setattr__(self, "e", None if self.e is None else e)
            found, V = torch.linalg.eigh((rows * w).mT @ (rows * w))
            over = found > bound * bound
            if over.any():
                V, A = V[:, over], w @ V[:, over]
                mu, speed = torch.zeros(A.shape[1]), rows**self.exponent
                for _ in range(12):  # Newton for 1 / sigma(mu) = 1 / bound
                    parts = (rows * A / (1 + mu * speed)).square()
                    sigma = parts.sum(0).sqrt()
                    mu = mu + (1 / bound - 1 / sigma).clamp(min=0) * sigma**3 / (parts * speed / (1 + mu * speed)).sum(
                        0
                    )
                w.add_((A * (1 / (1 + mu * speed) - 1)) @ V.mT)
            true.copy_(w * e)
            self.rows(weights, names)

    def proven(self, module: nn.Module) -> tuple[float | None, int | None]:
        return certified(module) if self.e is None else (None, None)

    def rows(self, weights: dict[str, Tensor], names) -> None:
        x = torch.full((weights[names["weight_ih"]].shape[1],), self.input_bound, dtype=torch.float64)
        STABILITY["lstm"].bring_in(weights, names, self, 0.0, x, torch.float64)


class NearestRows(Metric):
    """The forget gate's rows go to the nearest ones (soft threshold, sparse) that bound it, instead of being scaled."""

    def rows(self, weights: dict[str, Tensor], names) -> None:
        u, w, b, b2 = (weights[names[kind]].chunk(4)[1] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        bias = b + b2
        limit = math.log(self.forget / (1 - self.forget)) - bias.clamp(max=0)
        joined = torch.cat([u, w, bias.clamp(min=0)[:, None]], 1)
        row_project_(joined, limit)
        u.copy_(joined[:, : u.shape[1]]), w.copy_(joined[:, u.shape[1] : -1])
        less = torch.where(bias > 0, joined[:, -1] - bias, 0.0) / 2
        b.add_(less), b2.add_(less)


class Scaled(Stability):
    """tanh RNN, ||E W E^-1||_2 <= rate with E a fixed ramp of the condition `ramp`, or else balanced by Osborne's method at each step."""

    def __init__(self, rate: float, ramp: float | None = None) -> None:
        self.rate, self.ramp, self.e = rate, ramp, None

    @torch.no_grad()
    def project_(self, module: nn.Module, certify: bool = True) -> None:
        w = module.weight_hh_l0
        if self.e is None:
            self.e = torch.logspace(0, math.log10(self.ramp or 1), len(w))
        self.e = self.e if self.ramp else balance(w, self.e)
        w.copy_(clipped(self.e[:, None] * w / self.e, self.rate) * self.e / self.e[:, None])

    def proven(self, module: nn.Module) -> tuple[float, int]:
        rate = float(
            spectral_norm_bound(self.e.double()[:, None] * module.weight_hh_l0.detach().double() / self.e.double())
        )
        return rate, math.ceil(math.log(float(self.e.norm() / self.e.min()) / 1e-3) / -math.log(rate))


class Balls(Stability):
    """Groups whose units may read each other too: blocks of W_hh above the diagonal are 0, those on it lie within `norm` (LSTM: each row
    times the factor of `Certified(clamp=True)`'s norm, for the clamp `forget`)."""

    def __init__(self, groups: int, norm: float, forget: float | None = None) -> None:
        self.groups, self.norm = groups, norm
        self.inner = None if forget is None else Certified(clamp=True, forget=forget)

    def cap_of(self, cell: str) -> float:
        return 1.0 if self.inner is None else self.inner.cap_of(cell)

    @torch.no_grad()
    def project_(self, module: nn.Module, certify: bool = True) -> None:
        w = module.weight_hh_l0
        H = w.shape[1]
        rows = torch.ones(len(w))
        if self.inner is not None:
            weights = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
            ((_, scales, bound),) = STABILITY["lstm"].balls(weights, layer_names(module)[0][0], self.inner, 0.0)
            rows = (torch.tensor(scales) * self.norm / bound).repeat_interleave(H)
        gates, scaled = w.view(-1, H, H), rows.view(-1, H)
        edges = borders(H, self.groups)
        for a, b in zip(edges, edges[1:]):
            gates[:, a:b, b:] = 0
            block = (gates[:, a:b, a:b] * scaled[:, a:b, None]).flatten(0, 1)
            gates[:, a:b, a:b] = clipped(block, self.norm).view(-1, b - a, b - a) / scaled[:, a:b, None]

    def proven(self, module: nn.Module) -> tuple[None, None]:
        return None, None


def balance(w: Tensor, e: Tensor) -> Tensor:
    """e (H,) for which the rows of unit j in E w E^-1, w (G*H, H), are nearly as long as its column (Osborne 1960)."""
    for _ in range(5):
        square = ((w.view(-1, w.shape[1], w.shape[1]) * e[:, None]) / e).square().sum(0)
        e = e * (square.sum(0) / square.sum(1)).pow(0.25)
    return e


def clipped(w: Tensor, bound: float) -> Tensor:
    """The nearest matrix of spectral norm <= bound, up to rounding."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u * s.clamp(max=bound)) @ vh


@dataclass(frozen=True)
class Shape:
    """Of a model at the parameters, those that may differ from zero, of the others."""

    hidden: float = 1.0  # times --hidden
    layers: int = 1


DEEP, WIDE = Shape(0.61, 2), Shape(1.43)
SHAPES = {"two layers": DEEP, "wider": WIDE}  # behind the comma of a set's name

SETS: dict[str, Callable[[], Stability | None]] = {
    "rnn/plain": lambda: None,
    "rnn/Certified()": lambda: Certified(),
    "rnn/Certified(norm='radius')": lambda: Certified(norm="radius"),
    "rnn/Certified(0.95, norm='radius')": lambda: Certified(0.95, norm="radius"),
    "rnn/ramp 4": lambda: Scaled(0.99, 4.0),
    "rnn/balanced": lambda: Scaled(0.99),
    "lstm/plain": lambda: None,
    "lstm/ForgetCap(0.9)": lambda: ForgetCap(0.9),
    "lstm/Certified()": lambda: Certified(),
    "lstm/Certified(), clipped": lambda: Metric(0.0),
    "lstm/Certified(), nearest rows": lambda: NearestRows(2.0),
    "lstm/Certified(clamp=True)": lambda: Certified(clamp=True),
    "lstm/Certified(clamp=True), clipped": lambda: Metric(0.0, clamp=True),
    "lstm/Certified(clamp=True), exponent 1": lambda: Metric(1.0, clamp=True),
    "lstm/Certified(clamp=True), exponent 3": lambda: Metric(3.0, clamp=True),
    "lstm/Certified(clamp=True, forget=0.4)": lambda: Certified(clamp=True, forget=0.4),
    "lstm/Certified(clamp=True, forget=0.8)": lambda: Certified(clamp=True, forget=0.8),
    "lstm/Certified(clamp=True, forget=0.9)": lambda: Certified(clamp=True, forget=0.9),
    "lstm/Certified(clamp=True, forget=0.8), balanced": lambda: Metric(2.0, balanced=True, clamp=True, forget=0.8),
    "lstm/Certified(0.97, clamp=True, forget=0.8)": lambda: Certified(0.97, clamp=True, forget=0.8),
    "lstm/Certified(0.95, clamp=True, forget=0.8)": lambda: Certified(0.95, clamp=True, forget=0.8),
    "rnn/Cascade()": lambda: Cascade(),
    "rnn/Cascade(16)": lambda: Cascade(16),
    "rnn/Cascade(), wider": lambda: Cascade(),
    "rnn/8 groups with a ball of 0.8": lambda: Balls(8, 0.8),
    "lstm/Cascade()": lambda: Cascade(),
    "lstm/Cascade(4)": lambda: Cascade(4),
    "lstm/Cascade(16)": lambda: Cascade(16),
    "lstm/Cascade(forget=0.7)": lambda: Cascade(forget=0.7),
    "lstm/Cascade(forget=0.9)": lambda: Cascade(forget=0.9),
    "lstm/Cascade(), wider": lambda: Cascade(),
    "lstm/Cascade(4), two layers": lambda: Cascade(4),
    "lstm/plain, two layers": lambda: None,
    "lstm/8 groups with a ball of 0.99": lambda: Balls(8, 0.99, forget=0.8),
    "gru/plain": lambda: None,
    "gru/ForgetCap(0.9)": lambda: ForgetCap(0.9),
    "gru/Certified()": lambda: Certified(),
    "gru/Certified(clamp=True)": lambda: Certified(clamp=True),
    "gru/Certified(clamp=True, forget=0.8)": lambda: Certified(clamp=True, forget=0.8),
    "gru/Cascade()": lambda: Cascade(),
    "gru/Cascade(forget=0.8)": lambda: Cascade(forget=0.8),
    "gru/Cascade(4)": lambda: Cascade(4),
    "gru/Cascade(16)": lambda: Cascade(16),
}
CELLS = {"rnn": StableRNN, "lstm": StableLSTM, "gru": StableGRU}


# ---- the rig


class Model(nn.Module):
    """Symbols (T, B) to logits (T, B, V)."""

    def __init__(
        self, cell: type[nn.Module], symbols: int, hidden: int, stability: Stability | None, layers: int = 1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.rnn = cell(32, hidden, layers, stability=stability)
        self.readout = nn.Linear(hidden, symbols)

    def forward(self, ids: Tensor) -> Tensor:
        return self.readout(self.rnn(self.embedding(ids).tanh())[0])


def read(text: Path | None) -> tuple[Tensor, Tensor, int]:
    """Training and held-out symbols (N,), and the size of the alphabet."""
    if text is None:
        if not (DATA / "train.txt").exists():
            raise SystemExit(f"{DATA / 'train.txt'} is missing; see benchmarks/paper for its home, or pass --text FILE")
        train, valid = ((DATA / f"{part}.txt").read_text() for part in ("train", "valid"))
    else:
        whole = text.read_text()
        train, valid = whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]
    number = {c: i for i, c in enumerate(sorted(set(train) | set(valid)))}
    train, valid = (torch.tensor([number[c] for c in part]) for part in (train[:2_000_000], valid[: ROWS * ROW + 1]))
    return train, valid, len(number)


@torch.no_grad()
def held_out(model: Model, valid: Tensor) -> float:
    rows = (len(valid) - 1) // ROW
    x, y = (part[: rows * ROW].view(rows, ROW).mT for part in (valid[:-1], valid[1:]))
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() / math.log(2)


def train(
    name: str, seed: int, text: tuple[Tensor, Tensor, int], hidden: int, steps: int, weights: Path | None = None
) -> dict:
    torch.manual_seed(seed)
    stability, (train, valid, symbols), shape = SETS[name](), text, SHAPES.get(name.rpartition(", ")[2], Shape())
    model = Model(CELLS[name.partition("/")[0]], symbols, round(hidden * shape.hidden), stability, shape.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw, reach, began = torch.Generator().manual_seed(seed), torch.arange(STRETCH + 1), time.perf_counter()
    for _ in range(steps):
        starts = torch.randint(len(train) - STRETCH, (BATCH,), generator=draw)
        ids = train[starts + reach[:, None]]
        loss = functional.cross_entropy(model(ids[:-1]).flatten(0, 1), ids[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if stability is not None:
            stability.project_(model.rnn, certify=False)
    if stability is not None:
        stability.project_(model.rnn)
    seconds = time.perf_counter() - began
    if weights is not None:
        weights.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights / f"{name.replace('/', ' ')} {steps} {seed}.pt")
    rate, window = stability.proven(model.rnn) if hasattr(stability, "proven") else certified(model.rnn)
    return dict(
        name=name,
        seed=seed,
        hidden=hidden,
        steps=steps,
        bits=round(held_out(model, valid), 4),
        rate=rate,
        window=window,
        seconds=round(seconds, 1),
    )


def certified(module: nn.Module) -> tuple[float | None, int | None]:
    found = module.certificate()
    return (found.rate, found.window(1e-3)) if found.stable else (None, None)


def table(results: list[dict]) -> str:
    lines = ["| set | bits/char, by seed | mean | rate | window to 1e-3 |", "|---|---|---|---|---|"]
    for name in SETS:
        found = sorted((r for r in results if r["name"] == name), key=lambda r: r["seed"])
        if not found:
            continue
        bits = [r["bits"] for r in found]
        rate, window = found[0]["rate"], max((r["window"] or 0) for r in found)
        lines.append(
            f"| {name} | {', '.join(f'{b:.3f}' for b in bits)} | {statistics.mean(bits):.3f} | "
            f"{f'{rate:.3f} | {window}' if window else '- | -'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--weights", type=Path, help="a folder that keeps the trained models")
    args = parser.parse_args()
    for name in args.sets:
        if name not in SETS:
            parser.error(f"{name!r} is no set; there are {', '.join(SETS)}")
    file = args.out / f"{args.text.stem if args.text else 'ptb'}-h{args.hidden}-{args.steps}.jsonl"
    try:
        log = Log(file, dict(torch=torch.__version__), resume=True)
    except UserError as error:
        parser.error(str(error))
    text = None if args.table else read(args.text)
    for seed in [] if args.table else args.seeds:
        for name in args.sets or SETS:
            if any(r["name"] == name and r["seed"] == seed for r in log.rows):
                continue
            log.add(train(name, seed, text, args.hidden, args.steps, args.weights))
            print(log.rows[-1], flush=True)
    print(table(log.rows))


if __name__ == "__main__":
    main()
