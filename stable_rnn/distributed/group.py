"""A module's call on all ranks: what they are given, agreed upon before anything runs; then the layers, each over all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils.rnn import PackedSequence

from .. import layout, watch
from ..cells import MODES
from ..ops.recurrence.function import Layer
from ..ops.recurrence.problem import WHOLE
from ..validate import describe, pair
from . import lanes, states
from .exchange import Joined, agree
from .way import Way


class SequenceGroup:
    """The ranks whose stretches of time follow on each other, in their order."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.forward = torch.compiler.disable(self._forward)  # here, for it imports Dynamo

    def __deepcopy__(self, memo: dict) -> SequenceGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a module that shares time with other ranks cannot be pickled: sequence_parallel(model, None)")

    def _forward(self, module: Any, input: Any, hx: Any, lengths: Any, resets: Any) -> tuple[Tensor, Any]:
        """As the module's own, of this rank's stretch of the input and the states and lengths of the whole."""
        given, facts, error = None, {}, None
        try:
            given = _Given.of(module, input, hx, lengths, resets)
            facts = given.facts(module)
        except Exception as raised:
            error = raised
        sizes = agree(self.group, module.weight_hh_l0.device, given.steps if given else 0, facts, error)
        assert given is not None
        if module.training:
            watch.trains(module)
        y, *hidden = self._run(module, given, sizes)
        y = y.transpose(0, 1) if module.batch_first else y
        return y, tuple(hidden) if MODES[module.mode].has_cell else hidden[0]

    def _run(self, module: Any, given: _Given, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """y (T_r, B, D*P), and h_n (L*D, B, P) and c_n (L*D, B, H) of the whole."""
        x, (h0, c0), total = given.x, given.hx, sum(sizes)
        whole, local = torch.full((given.batch,), total, device="cpu"), None
        if given.lengths is not None:
            whole = layout.check_lengths(torch.tensor(given.lengths, device="cpu"), given.batch, total, whole.device)
            local = (whole - sum(sizes[: self.group.rank()])).clamp(0, given.steps).to(x.device)
            x = layout.without_padding(x, local, False)
        ways = [Way(self.group, sizes, whole, backwards, x.device) for backwards in (False, True)]
        rows = layout.padded(x.shape, False, local, None, x.device)
        y, h, c = module._stack(x.reshape(-1, x.shape[2]), rows, h0, c0, partial(_layer, ways))
        own = torch.stack([way.closes for way in ways[: 1 + module.bidirectional]]).repeat(module.num_layers, 1)
        return Joined.apply(self.group, own, False, y.view(*x.shape[:2], y.shape[1]), h, c)


def _layer(ways: list[Way], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.recurrence.function.layer`, whose arguments it takes, of one direction over all ranks."""
    *tensors, p, note = arguments
    run = states.run if p.checked or p.scanned else lanes.run
    return run(Layer._make((*tensors, note, p)), ways[p.step < 0])


class _Given(NamedTuple):
    """A call's arguments, as far as one rank can tell that they are right. x is (T_r, B, I)."""

    x: Tensor
    hx: tuple[Tensor, Tensor | None]
    lengths: list[int] | None

    @property
    def steps(self) -> int:
        return self.x.shape[0]

    @property
    def batch(self) -> int:
        return self.x.shape[1]

    @classmethod
    def of(cls, module: Any, input: Any, hx: Any, lengths: Any, resets: Any) -> _Given:
        if isinstance(input, PackedSequence):
            raise TypeError("a PackedSequence cannot be shared between ranks by time; give padded input, and lengths")
        if resets is not None:
            raise ValueError(
                "resets cannot be shared between ranks by time; give each piece as a sequence, with lengths"
            )
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise ValueError(f"input must be a tensor of 3 dimensions, got {describe(input)}")
        if MODES[module.mode].has_cell:
            hx = None if hx is None else pair(hx, 3)
        elif hx is not None:
            if not isinstance(hx, Tensor) or hx.dim() != 3:
                raise ValueError(f"hx must be a tensor h_0 of 3 dimensions, got {describe(hx)}")
            hx = hx, None
        x, hx = module._cast(input, hx)
        steps, batch = x.shape[:2][::-1] if module.batch_first else x.shape[:2]
        hx = module._zeros(x, batch) if hx is None else hx
        module._check_args(x, hx, None)
        for layer in range(module.num_layers):
            for direction in range(1 + module.bidirectional):
                if module.plan.at(layer, direction).numbers(input)["stride"] == WHOLE:
                    raise ValueError(
                        "Recurrent() goes from step to step, and cannot run on several ranks at once; give each layer one "
                        "of Windowed(k), Chunked(chunk, warmup), Verified(...), Scanned()"
                    )
        if steps == 0:
            raise ValueError("every rank's stretch must have a step at least, got an input without any")
        if lengths is not None:
            lengths = layout.as_lengths(lengths, batch, x.device).tolist()
        return cls(x.transpose(0, 1) if module.batch_first else x, hx, lengths)

    def facts(self, module: Any) -> dict[str, Any]:
        """What all ranks have to be given alike."""
        sources = self.x, *self.hx, *module.parameters()
        gradients = torch.is_grad_enabled() and [t is not None and t.requires_grad for t in sources]
        return {
            "batch": self.batch,
            "features": self.x.shape[2],
            "dtype": self.x.dtype,
            "device": self.x.device.type,
            "plan": module.plan,
            "lengths": self.lengths,
            "gradients of (input, states, parameters)": gradients,
        }
