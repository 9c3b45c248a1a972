"""Matrices with a known spectrum, and the exact projections in float64."""

import torch


def with_spectrum(values, m, n):
    """(m, n) float64 with the given singular values (as many as the smaller side) and random singular vectors."""
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return (U * torch.as_tensor(values, dtype=torch.float64)) @ V.T


def spectrum(kind, k, bound):
    """Singular values in units of the bound, times the bound. Every kind has some outside."""
    line = lambda high, low, count: torch.linspace(high, low, count, dtype=torch.float64)  # noqa: E731
    few = min(k, 5)
    values = {
        "flat": torch.full((k,), 1.3),
        "orthogonal": torch.full((k,), 1.01),
        "clustered": torch.cat([torch.full((k - k // 2,), 1.002), torch.full((k // 2,), 0.998)]),
        "near equal": 1.05 + 1e-9 * torch.arange(k, dtype=torch.float64).flip(0),
        "one far out": torch.cat([torch.tensor([50.0]), line(0.9, 0, k - 1)]),
        "a block": torch.cat([line(2, 1.05, few), line(0.95, 0, k - few)]),
        "all outside": line(3, 1.1, k),
        "rank 1": torch.cat([torch.tensor([3.0]), torch.zeros(k - 1)]),
        "just outside": torch.cat([torch.tensor([1.0005]), line(0.9995, 0, k - 1)]),
    }
    return values[kind].double() * bound


KINDS = (
    "flat",
    "orthogonal",
    "clustered",
    "near equal",
    "one far out",
    "a block",
    "all outside",
    "rank 1",
    "just outside",
)


def norm(W):
    """The exact spectral norm of what is stored."""
    return float(torch.linalg.matrix_norm(W.double(), 2)) if W.numel() else 0.0


def projected(W, bound, method):
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U * S.clamp(max=bound)) @ Vh if method == "clip" else W.double() * min(1.0, bound / float(S[0]))
