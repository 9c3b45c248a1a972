"""Moving matrices into the set of spectral norm <= bound, in place. The mathematics is in README.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .norm import check_bound, check_dtype, check_matrix, prove, scaled, shift, spectral_norm_bound, width
from .reference import fresh_vectors, krylov

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
        if not 1 <= kept or not 1 <= fresh:
            raise ValueError(f"kept and fresh must be at least 1, got {kept} and {fresh}")
        self.kept, self.fresh, self.seed = kept, fresh, seed
        self.calls = 0
        self.blocks: list[Tensor] = []
        self.exact: list[int] = []  # the call that last saw the whole spectrum

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
            self.exact = [self.calls - PERIOD] * len(blocks)
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

    W      a tensor or an iterable of tensors, any real floating dtype, any strides; parameters and views of parameters are written
           through. No two may overlap.
    bound  > 0; one for all or one per matrix.
    Returns float64, 0-dimensional for one matrix, (number of matrices,) otherwise: upper bounds of the norms after a certified call,
    estimates from below after an uncertified one.

    Raises, before anything is written: ValueError for NaN or infinite entries, a bound that is not positive and finite or
    requires grad, an unknown method, a tensor that is no matrix; TypeError for other dtypes, a bound that is no number, another state.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    single = isinstance(W, Tensor)
    matrices = [W] if single else list(W)
    for i, matrix in enumerate(matrices):
        name = "W" if single else f"W[{i}]"
        if isinstance(matrix, Tensor) and matrix.dim() != 2:
            raise ValueError(f"{name} must be a matrix (m, n), got the shape {tuple(matrix.shape)}")
        check_matrix(matrix, name) if certify else check_dtype(matrix, name)  # the step looks for NaN itself
    if state is not None and not isinstance(state, SpectralState):
        raise TypeError(f"state must be a SpectralState or None, got {type(state).__name__}")
    matrices = [matrix.detach() for matrix in matrices]
    bounds = _bounds(bound, len(matrices))
    state = SpectralState() if state is None else state
    cold = state.prepare(matrices)
    if certify:
        found = [_certified(*each, scale=method == "scale") for each in zip(matrices, bounds, state.blocks)]
        for matrix, (stored, _) in zip(matrices, found):
            if stored is not None:
                matrix.copy_(stored)
        state.exact = [state.calls] * len(matrices)
        norms = torch.stack([norm for _, norm in found]) if found else torch.zeros(0, dtype=torch.float64, device="cpu")
    else:
        norms = _stepped(matrices, bounds, method == "scale", state, COLD if cold else WARM)
    return norms[0] if single else norms


def _stepped(matrices: list[Tensor], bounds: list[float], scale: bool, state: SpectralState, iterations: int) -> Tensor:
    """One step. Where the whole block lies at the bound it cannot tell what else does: there an SVD follows every PERIOD calls."""
    norms, near = torch.ops.stable_rnn.spectral_step_(
        matrices, state.blocks, bounds, state.fresh, scale, iterations, state.seed + state.calls * max(1, len(matrices))
    )
    for i, (W, block, count) in enumerate(zip(matrices, state.blocks, near.tolist())):
        full = count >= block.shape[1] - state.fresh and block.shape[1] < min(W.shape) and not scale
        if full and state.calls - state.exact[i] >= PERIOD:
            A, own = scaled(W)
            limit, exponent = math.frexp(bounds[i])
            T = _svd_clipped(A.to(block.dtype), own - exponent, limit, block)
            W.copy_(shift(T, torch.tensor(exponent, device=T.device)))
            state.exact[i] = state.calls
    return norms


def _bounds(bound: float | Sequence[float] | Tensor, count: int) -> list[float]:
    check_bound(bound)
    values = bound.tolist() if isinstance(bound, Tensor) else bound
    values = [float(b) for b in values] if isinstance(values, (list, tuple)) else [float(values)] * count
    if len(values) != count:
        raise ValueError(f"bound must be one number or one per matrix ({count}), got {len(values)}")
    for b in values:
        if not 0 < b < math.inf:
            raise ValueError(f"bound must be positive and finite, got {b}")
    return values


def _certified(W: Tensor, bound: float, block: Tensor, scale: bool) -> tuple[Tensor | None, Tensor]:
    """(what to store, or None if W is inside; an upper bound of its norm). Writes the block only.

    The target T in float64 is rounded to W's dtype, and what is then proven inside is stored. Where rounding takes it outside again,
    the excess of the rounded matrix is subtracted from T once more: it accumulates there until rounding gives way, which one larger
    step cannot do (a correction below half a unit in the last place vanishes each time). One rounding is enough as a rule.
    """
    exponent = math.frexp(bound)[1]
    unit = torch.tensor(exponent, device=W.device)
    slack = width(max(W.shape), min(W.shape))
    limit = math.ldexp(bound, -exponent) * (1 - slack)  # in units of 2**exponent
    norm = _proven(W, limit, exponent)
    if norm is not None:
        return None, norm
    aim = limit * (1 - slack - torch.finfo(W.dtype).eps)
    A, own = scaled(W)
    T = (_scaled_target if scale else _clipped_target)(A, own - unit, aim, block)
    for attempt in itertools.count():
        stored = shift(T, unit).to(W.dtype)
        norm = _proven(stored, limit, exponent)
        if norm is not None:
            return stored, norm
        A = shift(stored.double(), -unit)
        if attempt > 30:  # seen only where the bound is a few of the dtype's smallest numbers
            T = T / 2
        elif scale:
            T = T * (aim / spectral_norm_bound(A))
        else:
            U, S, Vh = torch.linalg.svd(A, full_matrices=False)
            T = T - (U * (S - aim).clamp(min=0)) @ Vh


def _proven(W: Tensor, limit: float, exponent: int) -> Tensor | None:
    """An upper bound of the norm of W if limit * 2**exponent is proven to be about one, else None."""
    A, own = scaled(W)
    if not A.any():
        return torch.zeros((), dtype=torch.float64, device="cpu")
    gap = exponent - int(own)
    if abs(gap) > 500:  # so far outside, or inside, that the largest entry decides
        square = A.new_tensor(torch.inf if gap < 0 else float(A.numel()))
    else:
        square = prove(A, A.new_tensor(math.ldexp(limit, gap) ** 2))
    if torch.isinf(square):
        return None
    norm = shift(square.sqrt() * (1 + 1e-15), own)
    return norm.cpu()


def _scaled_target(A: Tensor, gap: Tensor, aim: float, block: Tensor) -> Tensor:
    return A * (aim / spectral_norm_bound(A))


def _clipped_target(A: Tensor, gap: Tensor, aim: float, block: Tensor) -> Tensor:
    """The projection of A * 2**gap onto the ball of radius aim, from the block where it suffices, else from an SVD."""
    if gap < 20:  # else the subtraction would cancel
        B = shift(A, gap)
        found = _few_outside(B, aim, block)
        if found is not None:
            U, S, V = found
            return B - (U * (S - aim).clamp(min=0)) @ V.mT
    return _svd_clipped(A, gap, aim, block)


def _svd_clipped(A: Tensor, gap: Tensor, aim: float, block: Tensor) -> Tensor:
    """The projection of A * 2**gap, and the block set to the top right singular vectors."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    block.copy_(Vh[: block.shape[1]].mT)
    floor = S[0] * max(A.shape) * torch.finfo(S.dtype).eps  # singular values below are rounding noise: keep the rank
    return (U * shift(torch.where(S > floor, S, 0).double(), gap).clamp(max=aim)) @ Vh.double()


def _few_outside(B: Tensor, aim: float, block: Tensor, rounds: int = 4, depth: int = 4) -> tuple[Tensor, Tensor, Tensor] | None:
    """Converged triplets of all singular values above aim, or None if the block is too small or converges too slowly.

    A residual R = B^T U - V S belongs to exact triplets of a matrix that is ||R||_F away, and the projection does not expand
    distances: the error of the clipped matrix is at most 2 ||R||_F (asked for: 1e-4 of the distance it moves).
    """
    V = block.to(B)
    whole = block.shape[1] == min(B.shape)
    for _ in range(rounds):
        U, S, V = krylov(B, V, depth)
        outside = int((S > aim).sum())
        if outside == len(S) and not whole:
            return None
        block.copy_(V)
        residual = torch.linalg.matrix_norm((B.mT @ U - V * S)[:, :outside])
        if residual <= 1e-4 * torch.linalg.vector_norm(S[:outside] - aim):
            return (U, S, V) if outside else None
    return None
