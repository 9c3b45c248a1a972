"""Moving matrices into the set of spectral norm <= bound, in place. The mathematics is in README.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._numbers import to_int
from . import certified
from .later import LAG, Sent, capturing, check_finite, on_gpu, send
from .memory import first_overlap
from .norm import check_bound, check_dtype, check_matrix, check_values, check_writable, scaled, shift
from .reference import fresh_vectors
from .registration import kernel

METHODS = ("clip", "scale")
COLD, WARM = 8, 2  # applications of W^T W to the block in one uncertified step
PERIOD = 16  # calls between two SVDs in uncertified steps, where the block is too small


class SpectralState:
    """The subspaces that the block power iteration carries from call to call, one (n, k) block per matrix; k <= kept + fresh.

    The caller keeps it (it belongs in no `state_dict`; deepcopy and pickle work) and passes it with the same matrices in the same
    order. A matrix of another shape, dtype or device starts its block anew. At each step the `fresh` last vectors are replaced by
    random ones, which find directions that the kept ones are blind to; they depend only on `seed` and the number of calls.
    """

    def __init__(self, kept: int = 14, fresh: int = 2, seed: int = 0):
        kept, fresh, seed = to_int("kept", kept, 1), to_int("fresh", fresh, 1), to_int("seed", seed)
        if not -(2**62) <= seed <= 2**62:  # it is counted on from there, and the op takes 64 bits
            raise ValueError(f"seed must lie between -2**62 and 2**62, got {seed}")
        self.kept, self.fresh, self.seed = min(kept, 2**31), min(fresh, 2**31), seed
        self.calls = 0
        self.blocks: list[Tensor] = []
        self.exact: list[int] = []  # the call that last saw the whole spectrum
        self.sent: Sent | None = None  # what a step on a GPU found, not yet read

    def __getstate__(self) -> dict:
        return {**self.__dict__, "sent": None}

    def prepare(self, matrices: Sequence[Tensor]) -> bool:
        """Makes the blocks fit the matrices; True if any of them had to start anew."""
        fits = len(self.blocks) == len(matrices)
        blocks = []
        for i, W in enumerate(matrices):
            shape = (W.shape[1], min(self.kept + self.fresh, *W.shape))
            dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
            block = self.blocks[i] if i < len(self.blocks) else None
            if block is None or block.shape != shape or block.dtype != dtype or block.device != W.device:
                fits = False
                block = fresh_vectors(torch.empty(shape, dtype=dtype, device=W.device), shape[1], self.seed - 1 - i)
            blocks.append(block)
        self.calls += 1
        if not fits:
            self.exact, self.sent = [self.calls - PERIOD] * len(blocks), None
        self.blocks = blocks
        return not fits


@torch.no_grad()
def spectral_project_(
    W: Tensor | Iterable[Tensor],
    bound: float | Sequence[float] | Tensor,
    method: str = "clip",
    certify: bool = True,
    state: SpectralState | None = None,
) -> Tensor:
    """Projects one matrix (m, n), or each of several, onto the spectral norm ball of radius `bound`, in place, with no autograd.

    method "clip":  W <- W - sum_i (s_i - bound)_+ u_i v_i^T, the Euclidean projection;  "scale":  W <- W * min(1, bound / s_1).

    certify=True: afterwards `spectral_norm_bound(W) <= bound` holds for what is stored, rounding included, and the norm of a matrix
    that was outside is at most 2 % below the bound (float16 and bfloat16 included). Matrices inside (proven: by 1e-7 or so) are left
    bitwise untouched. A converged block power iteration serves where few singular values are outside, an SVD otherwise.

    certify=False: one step of the block power iteration, cheap enough for every optimizer step. It never touches a matrix inside, but
    may leave singular values outside: between two steps they grow by no more than the norm of the update, and the persistent block in
    `state` catches up with them. Where the whole block lies at the bound (a flat spectrum) it cannot tell what else does: there an SVD
    follows in every 16th call, which keeps the norm below bound + 16 times the largest norm of an update. Without a state (or when it
    is new) the step is a cold one: more iterations, and that SVD at once. In bfloat16 and float16, corrections below half a unit in the
    last place of the entries are lost.
    On a GPU the step waits for nothing, but for a cold one: what it found is looked at in every 16th call, 4 calls late. So 16 becomes 20,
    and a matrix with NaN or infinite entries is left alone and raises when the next look finds it. While a CUDA graph is captured nothing
    is looked at, and replays repeat the same random vectors.

    W      a tensor or an iterable of tensors, any real floating dtype, any strides; parameters and views of parameters are written
           through.
    bound  > 0; one for all or one per matrix.
    Returns float64, 0-dimensional for one matrix, (number of matrices,) otherwise: upper bounds of the norms after a certified call, on the
    CPU; estimates from below after an uncertified one, on the device of the (first) matrix.

    Raises, before anything is written: ValueError for NaN or infinite entries (uncertified on a GPU: see above), a bound that is not
    positive and finite or requires grad, an unknown method, a tensor that is no matrix, on the meta device, overlaps itself (expanded)
    or shares memory with another one; TypeError for other dtypes, sparse tensors, a bound that is no number, another state.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    single = isinstance(W, Tensor)
    if not isinstance(W, Iterable):
        raise TypeError(f"W must be a tensor or several, got {type(W).__name__}")
    matrices: list[Any] = [W] if single else list(W)  # tensors, if all is well
    names = ["W"] if single else [f"W[{i}]" for i in range(len(matrices))]
    for matrix, name in zip(matrices, names):
        if isinstance(matrix, Tensor) and matrix.dim() != 2:
            raise ValueError(f"{name} must be a matrix (m, n), got the shape {tuple(matrix.shape)}")
        check_dtype(matrix, name)
        check_values(matrix, name)
        check_writable(matrix, name)
        if certify and not on_gpu([matrix]):  # there with the proofs; the step looks for NaN itself
            check_matrix(matrix, name)
    if state is not None and not isinstance(state, SpectralState):
        raise TypeError(f"state must be a SpectralState or None, got {type(state).__name__}")
    matrices = [matrix.detach() for matrix in matrices]
    bounds = _bounds(bound, len(matrices))
    shared = first_overlap(matrices) if len(matrices) > 1 else None
    if shared:
        raise ValueError(
            f"{names[shared[0]]} and {names[shared[1]]} share memory, where what is written for one would undo the other; "
            "pass each matrix once"
        )
    state = SpectralState() if state is None else state
    if certify:
        norms = _certified(matrices, names, bounds, method == "scale", state)
    else:
        norms = _stepped(matrices, bounds, method == "scale", state)
    return norms[0] if single else norms


def _certified(
    matrices: list[Tensor], names: list[str], bounds: list[float], scale: bool, state: SpectralState
) -> Tensor:
    def step(some: list[Tensor], blocks: list[Tensor], aims: list[float]) -> bool:
        able = kernel(some, blocks) is not None  # the reference would wait often
        if able:
            torch.ops.stable_rnn.spectral_step_(some, blocks, aims, state.fresh, scale, COLD, _seed(state, matrices))
        return able

    if on_gpu(matrices):
        norms = certified.look(matrices, bounds)
        for name, norm in zip(names, norms):
            if norm != norm:
                raise ValueError(f"{name} holds NaN or infinite values")
        state.prepare(matrices)
        found = certified.together(matrices, bounds, state.blocks, scale, norms, step)
    else:
        state.prepare(matrices)
        found = certified.one_by_one(matrices, bounds, state.blocks, scale)
    for matrix, (stored, _) in zip(matrices, found):
        if stored is not None:
            matrix.copy_(stored)
    state.exact = [state.calls] * len(matrices)
    return torch.tensor([norm for _, norm in found], dtype=torch.float64, device="cpu")


def _stepped(matrices: list[Tensor], bounds: list[float], scale: bool, state: SpectralState) -> Tensor:
    """One step. Where the whole block lies at the bound it cannot tell what else does: there an SVD follows every PERIOD calls."""
    cold = state.prepare(matrices)
    gpu = on_gpu(matrices)
    late = gpu and (not cold or capturing(matrices))
    counts, seen = None, state.calls
    if state.sent is not None and state.calls >= state.sent.call + LAG and not capturing(matrices):
        sent, state.sent = state.sent, None
        found, count = sent.read()
        check_finite(found)
        counts, seen = count.tolist(), sent.call
    norms, near = torch.ops.stable_rnn.spectral_step_(
        matrices, state.blocks, bounds, state.fresh, scale, COLD if cold else WARM, _seed(state, matrices)
    )
    if not late:
        if gpu:
            check_finite(norms)
        counts = near.tolist()
    elif state.calls % PERIOD == 0 and not capturing(matrices):
        state.sent = send(state.calls, norms, near)
    for i, count in enumerate(counts or ()):
        W, block = matrices[i], state.blocks[i]
        full = count >= block.shape[1] - state.fresh and block.shape[1] < min(W.shape) and not scale
        if full and seen - state.exact[i] >= (1 if late else PERIOD):
            A, own = scaled(W)
            limit, exponent = math.frexp(bounds[i])
            T = certified.svd_clipped(A.to(block.dtype), own - exponent, limit, block)
            W.copy_(shift(T, torch.tensor(exponent, device=T.device)))
            state.exact[i] = state.calls
    return norms


def _seed(state: SpectralState, matrices: list[Tensor]) -> int:
    return state.seed + state.calls * max(1, len(matrices))


def _bounds(bound: float | Sequence[float] | Tensor, count: int) -> list[float]:
    check_bound(bound)
    values: Any = bound.tolist() if isinstance(bound, Tensor) else bound
    given = values if isinstance(values, (list, tuple)) else [values] * count
    if len(given) != count:
        raise ValueError(f"bound must be one number or one per matrix ({count}), got {len(given)}")
    bounds = [float(b) for b in given]
    for b in bounds:
        if not 0 < b < math.inf:
            raise ValueError(f"bound must be positive and finite, got {b}")
    return bounds
