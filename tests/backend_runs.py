"""Modules on one backend, held against the reference; what the tests of the GPU backends share."""

import torch

from stable_rnn import Cascade, Chunked, Recurrent, Scanned, Verified, Windowed

PLANS = [Recurrent(), Windowed(4), Chunked(5, 3), Verified(chunk=6, warmup=2), Scanned()]
PROBES = Verified(chunk=4, warmup=0, correct="probes")


def made(cls, dtype, device, hidden=12, **options):
    """A plain module; a cascade where the plan needs one."""
    torch.manual_seed(0)
    m = cls(7, hidden, stability=None, **options)
    if m.plan == Scanned():
        m.stability = Cascade(3)
        m.project_().stability = None
    return m.to(device, dtype)


def results(m, x, backend, dtype=None, **call):
    """Outputs and gradients, in float64, of a copy of m in `dtype` that runs on `backend`."""
    copy = type(m)(
        m.input_size,
        m.hidden_size,
        m.num_layers,
        bidirectional=m.bidirectional,
        stability=m.stability,
        plan=m.plan,
        backend=backend,
    ).to(x.device, dtype or x.dtype)
    copy.load_state_dict(m.state_dict())
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    y, state = copy(x, **call)
    state = state if isinstance(state, tuple) else (state,)
    loss = sum(
        (t.double() * torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)).sum() for t in (y, *state)
    )
    grads = torch.autograd.grad(loss, [x, *copy.parameters()])
    return [t.detach().double() for t in (y, *state, *grads)]


def assert_close(backend, m, x, **call):
    """At most twice the error that the reference makes in the same dtype, and a unit of the storage type of the largest value: the two
    round sums in another order, which moves a stored value to its neighbour."""
    exact = results(m, x, "reference", torch.float64, **call)
    eager = results(m, x, "reference", **call)
    found = results(m, x, backend, **call)
    for want, plain, have in zip(exact, eager, found, strict=True):
        limit = 2 * (plain - want).abs().max() + 2 * torch.finfo(x.dtype).eps * want.abs().max()
        assert (have - want).abs().max() <= limit


def assert_captured(m):
    """A CUDA graph captured from m in eval mode, and replayed, gives m's own bits."""
    m.eval()
    x = torch.randn(17, 3, m.input_size, device="cuda", dtype=m.weight_hh_l0.dtype)
    with torch.no_grad():
        want = m(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = m(x)[0]
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(y, want)
