"""The differentiable form of the projection: W * min(1, bound / ||W||_2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._numbers import to_float
from .norm import check_bound, check_dtype


class SpectralProjection(torch.autograd.Function):
    """(W, bound) -> (W * min(1, bound / sigma), sigma, u, v), with the top singular triplet as differentiable outputs.

    The backward uses  d sigma = u^T dW v  and is itself made of differentiable operations: because u and v are outputs of this
    Function, a second backward asks this one for their gradients, and so on to any order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma, u, v = torch.ops.stable_rnn.top_singular(W)
        return (W * _factor(sigma, bound)).to(W.dtype), sigma, u, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        W, ctx.bound = inputs
        ctx.save_for_backward(W, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsigma: Tensor | None, du: Tensor | None, dv: Tensor | None) -> tuple:
        W, sigma, u, v = ctx.saved_tensors
        bound, dtype = ctx.bound, W.dtype
        W = W.to(sigma.dtype)
        outside = sigma > bound
        dW = torch.zeros_like(W)
        dsigma = torch.zeros_like(sigma) if dsigma is None else dsigma
        if dy is not None:
            dW = dy * _factor(sigma, bound)
            slope = torch.where(outside, bound / sigma.clamp(min=bound).square(), 0.0)
            dsigma = dsigma - slope * (dy * W).sum((-2, -1))
        dW = dW + dsigma[..., None, None] * _outer(u, v)
        if du is not None or dv is not None:
            du = torch.zeros_like(u) if du is None else du
            dv = torch.zeros_like(v) if dv is None else dv
            dW = dW + _vectors_backward(W, sigma, u, v, du, dv, outside)
        return dW.to(dtype), None


def _factor(sigma: Tensor, bound: float) -> Tensor:
    return (bound / sigma.clamp(min=bound))[..., None, None]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _vectors_backward(
    W: Tensor, sigma: Tensor, u: Tensor, v: Tensor, du: Tensor, dv: Tensor, outside: Tensor
) -> Tensor:
    """The gradient through u and v, for a simple singular value. From W v = sigma u and W^T u = sigma v, across u and v,

        (sigma^2 - W W^T) du = sigma dW v + W dW^T u,   (sigma^2 - W^T W) dv = W^T dW v + sigma dW^T u;

    this is the adjoint, in units of sigma. Where W is inside nothing depends on u and v: the system is replaced by the identity.
    """
    A = W / torch.where(outside, sigma, 1.0)[..., None, None]
    across_u = du - u * (u * du).sum(-1, keepdim=True)
    across_v = dv - v * (v * dv).sum(-1, keepdim=True)

    def solve(square: Tensor, top: Tensor, right: Tensor) -> Tensor:
        eye = torch.eye(top.shape[-1], dtype=top.dtype, device=top.device)
        M = torch.where(outside[..., None, None], eye + _outer(top, top) - square, eye)
        return torch.linalg.solve(M, right[..., None])[..., 0]

    a = solve(A @ A.mT, u, across_u)
    c = solve(A.mT @ A, v, across_v)
    left, right = a + (A @ c[..., None])[..., 0], c + (A.mT @ a[..., None])[..., 0]
    return (_outer(left, v) + _outer(u, right)) / torch.where(outside, sigma, 1.0)[..., None, None]


def spectral_projection(W: Tensor, bound: float) -> Tensor:
    """W * min(1, bound / ||W||_2), differentiable: for parametrizations, where `spectral_project_` is for optimizer loops.

    Shapes:  W (..., m, n), any real floating dtype  ->  the same. The norm comes from a block power iteration run to convergence in
    W's own precision (float32 for the halves); it is no rigorous bound (that is `spectral_norm_bound`).
    Differentiable to any order where the largest singular value is simple; where it is not, the first derivative is one of the
    generalized ones and higher ones do not exist. In reverse mode only: `torch.func.jvp` and `jacfwd` raise. Matrices inside pass
    unchanged. Works under `torch.func.vmap` and `torch.compile`.

    bound  > 0, a number.
    Raises ValueError for NaN or infinite entries, fewer than two dimensions, a bound that is not positive and finite or requires grad;
    TypeError for other dtypes and a bound that is no number.
    """
    check_dtype(W)
    check_bound(bound)
    bound = to_float("bound", bound)
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be positive and finite, got {bound}")
    return SpectralProjection.apply(W, bound)[0]
