"""The lanes of a checked run in visiting order, forward or backward in time: place q of row b is the q-th lane of that row that states
pass through. The loop of `verified.py` sees no difference between the two."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .corrections import Borders
from .problem import Adjoint, BackwardInputs, Inputs, Output, Problem, row_base, row_length
from .reference import arithmetic

Ends = tuple[Tensor, Tensor]  # h and c; empty for cells that have no c


class Sweep:
    """One direction in time. `out` holds what the lanes that ran have written."""

    backward: bool
    out: Any = None

    def __init__(self, backend: ModuleType, inputs: Inputs | BackwardInputs, p: Problem) -> None:
        self.backend, self.p, self.inputs = backend, p, inputs
        self.batch, self.device = inputs.state.shape[0], inputs.rows.device
        self.base = row_base(p, self.batch, inputs.base, self.device)
        self.length = row_length(p, self.batch, inputs.lengths, self.device)

    def cut(self, p: Problem) -> None:
        """Lanes of another chunk and warm-up."""
        self.p, self.lanes, self.out = p, p.lanes(), None

    @property
    def state(self) -> tuple[Tensor, ...]:
        """h_start, c_start, h_end, c_end, decay, by lane id; c of cells that have one."""
        h, c, h_end, c_end, decay = self.out[-5:]
        none = c[:0]
        return (h, c, h_end, c_end, decay) if self.p.spec.has_cell else (h, none, h_end, none, decay)

    def largest(self) -> Tensor:
        """The largest entry of the ends so far."""
        sizes = [t.abs().nan_to_num(0.0, 0.0).max() for t in self.state[2:4] if t.numel()]
        return torch.stack(sizes or [self.state[2].new_ones(())]).max().clamp_min(torch.finfo(self.state[2].dtype).tiny)

    def zeros(self, count: int) -> tuple[Tensor, Tensor | None]:
        """States of so many rows, in the arithmetic's dtype."""
        w_hh, kind = self.inputs.w_hh, arithmetic(self.inputs.rows.dtype)
        h = torch.zeros(count, w_hh.shape[1], dtype=kind, device=self.device)
        hidden = w_hh.shape[0] // self.p.spec.gates
        return h, h.new_zeros(count, hidden) if self.p.spec.has_cell else None

    def ids(self, places: Tensor) -> Tensor:
        """Lane ids of places q * B + b."""
        if not self.backward:
            return places
        return (self.lanes - 1 - places // self.batch) * self.batch + places % self.batch

    def visited(self, by_id: Tensor, first: int, last: int) -> Tensor:
        """Rows (L*B, F) of the lanes at places [first, last): (last - first, B, F)."""
        if not by_id.numel():
            return by_id.new_empty(0)
        by_lane = by_id.view(self.lanes, self.batch, -1)
        return by_lane.flip(0)[first:last] if self.backward else by_lane[first:last]

    def borders(self, first: int, last: int) -> Borders:
        """The borders behind which lie the lanes [first, last), first >= 1."""
        h, c, h_end, c_end, decay = self.state
        h_end, c_end, decay = (self.visited(t, first - 1, last - 1) for t in (h_end, c_end, decay))
        lane = torch.arange(first, last, device=self.device)
        later = (
            self.lanes - lane if self.backward else lane
        )  # which of the two lanes of a border is the later one in time
        time = later[:, None] * self.p.stride
        exists = time < self.length
        resets = self.inputs.resets
        if resets is not None and resets.numel() and not self.backward:  # nothing passes; adjoints there are zero
            exists &= ~resets[torch.where(exists, self.base + time * self.p.step, 0)]
        return Borders(self.visited(h, first, last), self.visited(c, first, last), h_end, c_end, decay, exists)

    def run(self, first: int, last: int) -> None:
        """The lanes [first, last), after their warm-up."""
        whole = first == 0 and last == self.lanes
        places = torch.arange(first * self.batch, last * self.batch, device=self.device)
        self._run(None if whole else self.ids(places), None, None)

    def rerun(self, places: Tensor, h: Tensor, c: Tensor | None) -> None:
        """The lanes at these places from these states."""
        self._run(self.ids(places), h, c)

    def _run(self, ids: Tensor | None, h: Tensor | None, c: Tensor | None) -> None:
        raise NotImplementedError

    def whole(self) -> None:
        """The plain recurrence."""
        raise NotImplementedError

    def rest(self, first: int) -> None:
        """The plain recurrence from the border before lane `first` >= 1 on."""
        raise NotImplementedError

    def ends(self, row: Tensor, time: Tensor, steps: Tensor, h: Tensor, c: Tensor | None, linear: bool = False) -> Ends:
        """Where runs end that go through times [time, time + steps) of their rows, from these states: h, c. Nothing else is stored.
        `linear`: of adjoints, without upstream gradients."""
        raise NotImplementedError

    def probe(self, places: Tensor, unit: Tensor, h: Tensor, c: Tensor | None) -> Ends:
        """`ends` of the lanes at these places, in whose starts one unit was moved."""
        ids = self.ids(places)
        row, time = ids % self.batch, ids // self.batch * self.p.stride
        steps = (self.length[row] - time).clamp(0, self.p.stride)
        return self._probe(row, time, steps, unit, h, c)

    def _probe(self, row: Tensor, time: Tensor, steps: Tensor, unit: Tensor, h: Tensor, c: Tensor | None) -> Ends:
        return self.ends(row, time, steps, h, c)

    def rows_of(self, places: Tensor) -> Tensor:
        """Buffer rows of what lanes write: (n, C); a lane's shorter end repeats its last row."""
        ids = self.ids(places)
        row, time = ids % self.batch, ids // self.batch * self.p.stride
        t = time[:, None] + torch.arange(self.p.stride, device=self.device)
        return self.base[row][:, None] + t.minimum((self.length[row] - 1)[:, None]).clamp_min(0) * self.p.step


class Forward(Sweep):
    backward = False
    out: Output

    def __init__(self, backend: ModuleType, inputs: Inputs, p: Problem, save: bool) -> None:
        super().__init__(backend, inputs, p)
        self.save = save

    def _run(self, ids: Tensor | None, h: Tensor | None, c: Tensor | None) -> None:
        self.out = self.backend.forward(
            self.inputs, self.p, save=self.save, borders=True, ids=ids, h_init=h, c_init=c, out=self.out
        )

    def whole(self) -> None:
        self.out = self.backend.forward(self.inputs, self.p.whole(), save=self.save)

    def rest(self, first: int) -> None:
        time, out = first * self.p.stride, self.out
        c0 = out.c_n.clone() if self.inputs.c0 is not None else None
        given = self.inputs._replace(  # rows that have ended hand their final states on
            h0=out.h_n.clone(), c0=c0, base=self.base + time * self.p.step, lengths=(self.length - time).clamp_min(0)
        )
        p = self.p._replace(steps=self.p.steps - time).whole()
        h, c = (self.visited(t, first - 1, first)[0] if t.numel() else None for t in (out.h_end, out.c_end))
        self.out = self.backend.forward(given, p, save=self.save, h_init=h, c_init=c, out=_without_borders(out))

    def ends(self, row: Tensor, time: Tensor, steps: Tensor, h: Tensor, c: Tensor | None, linear: bool = False) -> Ends:
        given = self.inputs._replace(base=self.base[row] + time * self.p.step, lengths=steps)
        return self.backend.ends(given, self.p._replace(steps=_longest(self.p, steps)), h, c)


class Backward(Sweep):
    backward = True
    out: Adjoint
    inputs: BackwardInputs

    def _run(self, ids: Tensor | None, h: Tensor | None, c: Tensor | None) -> None:
        self.out = self.backend.backward(self.inputs, self.p, borders=True, ids=ids, dh_init=h, dc_init=c, out=self.out)

    def whole(self) -> None:
        self.out = self.backend.backward(self.inputs, self.p.whole())

    def rest(self, first: int) -> None:
        time, out = (self.lanes - first) * self.p.stride, self.out
        begun = (self.length > time)[
            :, None
        ]  # the others begin before that time, from the gradients of their final states
        h, c = (
            None if given is None else torch.where(begun, self.visited(end, first - 1, first)[0], given.to(end.dtype))
            for end, given in ((out.dh_end, self.inputs.dh_n), (out.dc_end, self.inputs.dc_n))
        )
        inputs = self.inputs._replace(base=self.base, lengths=self.length.clamp_max(time))
        p = self.p._replace(steps=time).whole()
        self.out = self.backend.backward(inputs, p, dh_init=h, dc_init=c, out=_without_borders(out))

    def _probe(self, row: Tensor, time: Tensor, steps: Tensor, unit: Tensor, h: Tensor, c: Tensor | None) -> Ends:
        """The adjoint of c begins one step before the lane, so that dh is what comes with it; the ends are then over that step's gate."""
        before = (c is not None) & (steps > 0) & (time + steps < self.length[row])
        found = self.ends(row, time, steps + before, h, c, linear=True)
        if c is None:
            return found
        rows = torch.where(before, self.base[row] + (time + steps) * self.p.step, 0)
        gate = self.p.spec.forget_gate(self.inputs.saved[rows]).to(h.dtype).gather(1, unit[:, None])
        kept = torch.where(before[:, None], gate, 1.0)
        return found[0] / kept, found[1] / kept

    def ends(self, row: Tensor, time: Tensor, steps: Tensor, h: Tensor, c: Tensor | None, linear: bool = False) -> Ends:
        inputs, base = self.inputs, self.base[row] + time * self.p.step
        later = (time > 0) & (steps > 0)
        before = torch.where(later, base - self.p.step, 0)  # the state that the first step read
        earlier = lambda given, kept: torch.where(later[:, None], kept[before].to(given.dtype), given[row])  # noqa: E731
        given = inputs._replace(
            dy=None if linear else inputs.dy,  # type: ignore[arg-type]  # `adjoint_ends` takes None
            base=base,
            lengths=steps,
            h0=None if inputs.h0 is None else earlier(inputs.h0, inputs.y),
            c0=None if inputs.c0 is None else earlier(inputs.c0, inputs.cells),
        )
        return self.backend.adjoint_ends(given, self.p._replace(steps=_longest(self.p, steps)), h, c)


def _longest(p: Problem, steps: Tensor) -> int:
    return max(1, int(steps.max())) if steps.numel() else p.stride


def _without_borders(out: Any) -> Any:
    empty = out[-1].new_empty(0)
    return out._replace(**dict.fromkeys(out._fields[-5:], empty))
