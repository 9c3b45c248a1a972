"""Where time lies among the ranks, and the order in which states visit them, and adjoints.

A sequence's *own* times count from its start, or from its end in the reverse direction, as lanes do (`params.h`). The *place* of a rank is
its number in the order of visits: its rank, or counted from the last."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .exchange import Exchange, gather

State = tuple[Tensor, Tensor | None]  # h (B, P), and c (B, H) of cells that have one


def chosen(where: Tensor, state: State, other: State | None = None) -> State:
    """`state` where (B, 1) says so, and elsewhere `other`, or zeros."""
    (h, c), (other_h, other_c) = state, other or (0, 0)
    return torch.where(where, h, other_h), None if c is None or other_c is None else torch.where(where, c, other_c)


class Order(NamedTuple):
    """One order of visits: of states, or of adjoints."""

    group: ProcessGroup
    descending: bool  # the last rank is visited first
    arrives: Tensor  # (R, B) by place: the sequence goes on there from the place before

    @property
    def place(self) -> int:
        rank, ranks = self.group.rank(), self.group.size()
        return ranks - 1 - rank if self.descending else rank

    @property
    def here(self) -> Tensor:
        """(B, 1): what of `arrives` concerns this rank."""
        return self.arrives[self.place][:, None]

    def gather(self, t: Tensor) -> Tensor:
        """(R, *t.shape) by place."""
        found = gather(t, self.group)
        return found.flip(0) if self.descending else found

    def handed_on(self, t: Tensor) -> Tensor:
        """What the place before gives as t (B, F); zeros at the first."""
        rank, ranks, step = self.group.rank(), self.group.size(), -1 if self.descending else 1
        count = lambda there: [len(t) * (r == there) for r in range(ranks)]  # noqa: E731
        sends, receives = count(rank + step), count(rank - step)
        found = Exchange.apply(self.group, sends, receives, t if any(sends) else t[:0])
        return found if any(receives) else torch.zeros_like(t)


class Way:
    """One direction in time. `lengths` (B,) on the CPU; buffers hold the rows of time t at t * B, from the first that they have."""

    def __init__(
        self, group: ProcessGroup, sizes: list[int], lengths: Tensor, backwards: bool, device: torch.device
    ) -> None:
        self.group, self.sizes, self.lengths, self.backwards, self.device = group, sizes, lengths, backwards, device
        self.rank, self.total, self.batch = group.rank(), sum(sizes), len(lengths)
        self.ends = list(accumulate(sizes))
        stop = torch.tensor(self.ends, device="cpu")[:, None]
        start = stop - torch.tensor(sizes, device="cpu")[:, None]
        if backwards:
            begin, end = (lengths - stop).clamp_min(0).flip(0), (lengths - start).clamp_min(0).flip(0)
        else:
            begin, end = start.minimum(lengths), stop.minimum(lengths)
        # (R, B) by place, of own times
        self.begin, self.end = begin, end
        self.live = end > begin
        self.place = len(sizes) - 1 - self.rank if backwards else self.rank

    @property
    def steps(self) -> int:
        return self.sizes[self.rank]

    @property
    def first(self) -> int:
        """The time of this rank's first step."""
        return self.ends[self.rank] - self.steps

    @property
    def step(self) -> int:
        return -self.batch if self.backwards else self.batch

    @cached_property
    def states(self) -> Order:
        return Order(self.group, self.backwards, (self.live & (self.begin > 0)).to(self.device))

    @cached_property
    def adjoints(self) -> Order:
        onward = self.live & (self.begin > 0)
        arrives = torch.cat([torch.zeros_like(onward[:1]), onward[1:].flip(0)])
        return Order(self.group, not self.backwards, arrives.to(self.device))

    @cached_property
    def opens(self) -> Tensor:
        """(B, 1) whether a sequence begins here; one without steps does so at the first place."""
        found = (self.begin[self.place] == 0) & (self.live[self.place] | self._empty)
        return found[:, None].to(self.device)

    @cached_property
    def closes(self) -> Tensor:
        """(B,) whether a sequence ends here."""
        found = (self.end[self.place] == self.lengths) & (self.live[self.place] | self._empty)
        return found.to(self.device)

    @property
    def _empty(self) -> Tensor:
        return (self.lengths == 0) & (self.place == 0)

    def rows(self, begin: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Of each sequence, the own times from `begin` (B,) to the end of this rank's stretch, in a buffer from time `first` on: the buffer
        row of their first, and their number. 0 of those that have none here."""
        used = torch.where(self.live[self.place], self.end[self.place] - begin, 0)
        time = (self.lengths - 1 - begin if self.backwards else begin) - first
        base = torch.where(used > 0, time * self.batch, 0) + torch.arange(self.batch, device="cpu")
        return base.to(self.device), used.to(self.device)

    @cached_property
    def own(self) -> tuple[Tensor, Tensor]:
        """`rows` of what this rank holds."""
        return self.rows(self.begin[self.place], self.first)

    @cached_property
    def there(self) -> Tensor:
        """(T_r, B, 1) whether a sequence has that time."""
        time = torch.arange(self.first, self.first + self.steps, device="cpu")[:, None, None]
        return (time < self.lengths[:, None]).to(self.device)
