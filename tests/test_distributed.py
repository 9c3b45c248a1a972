"""Time shared between ranks: gloo processes on the CPU, which compute what one process does of the whole. Each rank has the whole too."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from executor import build
from ranks import needs_gloo, on_ranks
from torch import nn

from stable_rnn import (
    Cascade,
    Chunked,
    ForgetCap,
    Recurrent,
    Scanned,
    StableGRU,
    StableLSTM,
    StableRNN,
    Verified,
    Windowed,
)
from stable_rnn.distributed import sequence_parallel

pytestmark = needs_gloo
B, I, H = 3, 4, 6  # noqa: E741
BOTH = dict(num_layers=2, bidirectional=True)
LENGTHS = (19, 0, 8)


def remembering(module):
    """A forget gate (an update gate) near 1: starts are seen at the end of all."""
    gates = module.weight_hh_l0.shape[0] // H
    with torch.no_grad():
        for name, bias in module.named_parameters():
            if name.startswith("bias_ih"):
                bias.view(gates, H)[1] += 3
    return module


# module, plan, and that of the whole where it is another
CASES = {
    "windows": (lambda p: StableLSTM(I, H, **BOTH, plan=p), Windowed(4), None),
    "windows longer than a rank's times": (lambda p: StableGRU(I, H, **BOTH, plan=p), Windowed(14), None),
    "windows over all": (lambda p: StableRNN(I, H, plan=p), Windowed(10**30), None),
    "windows, projected": (lambda p: StableLSTM(I, H, **BOTH, proj_size=2, plan=p), Windowed(6), None),
    "chunks": (lambda p: StableLSTM(I, H, **BOTH, plan=p), Chunked(4, 3), None),
    "chunks without warm-up": (lambda p: StableGRU(I, H, **BOTH, plan=p), Chunked(5, 0), None),
    "short chunks": (lambda p: StableRNN(I, H, **BOTH, plan=p), Chunked(2, 5), None),
    "chunks of one step": (lambda p: StableLSTM(I, H, stability=ForgetCap(0.7), plan=p), Chunked(1, 3), None),
    "chunks over all": (lambda p: StableLSTM(I, H, **BOTH, plan=p), Chunked(64, 8), None),
    "scans, LSTM": (lambda p: StableLSTM(I, H, **BOTH, stability=Cascade(3, 0.9), plan=p), Scanned(), None),
    "scans, GRU": (lambda p: StableGRU(I, H, **BOTH, stability=Cascade(3, 0.9), plan=p), Scanned(), None),
    "scans, RNN": (lambda p: StableRNN(I, H, **BOTH, stability=Cascade(3), plan=p), Scanned(), None),
    "scans of a plain cascade": (lambda p: _cascade(StableLSTM(I, H, stability=None, plan=p)), Scanned(), None),
    "checked, LSTM": (
        lambda p: remembering(StableLSTM(I, H, **BOTH, stability=None, plan=p)),
        Verified(0),
        Recurrent(),
    ),
    "checked, GRU": (lambda p: remembering(StableGRU(I, H, **BOTH, stability=None, plan=p)), Verified(0), Recurrent()),
    "checked, RNN": (lambda p: StableRNN(I, H, **BOTH, stability=None, plan=p), Verified(0), Recurrent()),
    "checked, projected": (
        lambda p: remembering(StableLSTM(I, H, **BOTH, proj_size=2, stability=None, plan=p)),
        Verified(0, chunk=2, warmup=1),
        Recurrent(),
    ),
    "checked, uncorrected": (
        lambda p: remembering(StableLSTM(I, H, stability=None, plan=p)),
        Verified(0, correct="none"),
        Recurrent(),
    ),
    "a plan each": (
        lambda p: StableLSTM(I, H, **BOTH, stability=Cascade(3), plan=p),
        {0: Windowed(3), (1, 0): Scanned(), (1, 1): Chunked(3, 2)},
        None,
    ),
}


def _cascade(module):
    with torch.no_grad():
        module.weight_hh_l0.mul_(torch.ones(4, H, H).tril(-1).view(4 * H, H))
    return module


def results(module, x, hx, lengths, dy, dh, dc, share):
    """Outputs and gradients of one call, and the loss of the parts that `share` names."""
    module.zero_grad()
    leaves = [t.clone().requires_grad_() for t in (x, *hx)]
    states = tuple(leaves[1:]) if len(hx) == 2 else leaves[1]
    y, hidden = module(leaves[0], states, lengths=lengths)
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    parts = [(y, dy), (hidden[0], dh), (hidden[-1], dc)]
    sum((parts[n][0] * parts[n][1]).sum() for n in share).backward()
    names = ["y", "h_n", "c_n", "dx", "dh0", "dc0"]
    found = dict(zip(names, [y, hidden[0], hidden[-1], *(t.grad for t in leaves)]))
    found |= {"d" + name: p.grad for name, p in module.named_parameters()}
    return {name: torch.zeros_like(x[:0]) if t is None else t.detach() for name, t in found.items()}


def differences(case, sizes, lengths, dtype=torch.float64, batch_first=False, backend="auto"):
    """The largest error of every output and gradient, of the ranks' and of the whole's own, relative to the largest true value."""
    make, plan, of_whole = CASES[case]
    torch.manual_seed(0)
    ours, rank, total = make(plan).to(dtype), dist.get_rank(), sum(sizes)
    whole, exact = (make(of_whole or plan).to(kind) for kind in (dtype, torch.float64))
    ours.backend = whole.backend = backend
    whole.load_state_dict(ours.state_dict()), exact.load_state_dict(ours.state_dict())
    ways, out = 1 + ours.bidirectional, getattr(ours, "proj_size", 0) or H
    count = 2 if isinstance(ours, StableLSTM) else 1
    hx = [torch.randn(ours.num_layers * ways, B, n, dtype=dtype) for n in (out, H)[:count]]
    given = [
        torch.randn(total, B, I),
        torch.randn(total, B, ways * out),
        torch.randn_like(hx[0]),
        torch.randn_like(hx[-1]),
    ]
    x, dy, dh, dc = (t.to(dtype) for t in given)
    lengths = torch.tensor(lengths) if lengths else None
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def run(module, times, share):
        module.batch_first = batch_first
        turned = (lambda t: t.transpose(0, 1)) if batch_first else lambda t: t
        kind = module.weight_hh_l0.dtype
        parts = [t.to(kind) for t in (turned(x[times]), *hx)]
        found = results(module, parts[0], parts[1:], lengths, turned(dy[times]), dh, dc, share)
        return found | {name: turned(found[name]) for name in ("y", "dx")}

    truth = run(exact, slice(None), (0, 1, 2))
    theirs = truth if dtype == torch.float64 else run(whole, slice(None), (0, 1, 2))
    sequence_parallel(ours, dist.group.WORLD)
    # the gradient of h_n comes from the first rank alone, that of c_n from the last
    found = run(ours, mine, [0] + [1] * (rank == 0) + [2] * (rank == len(sizes) - 1))
    errors = {}
    for name, wanted in truth.items():
        size, got = float(wanted.abs().max()) if wanted.numel() else 0.0, found[name]
        if name[0] == "d" and name != "dx":
            dist.all_reduce(got)
        wanted, other = (t[name][mine] if name in ("y", "dx") else t[name] for t in (truth, theirs))
        assert got.shape == wanted.shape, name
        if wanted.numel() and size:
            errors[name] = tuple(float((t.double() - wanted).abs().max()) / size for t in (got, other))
    return errors


def _two(rank):
    found = {}
    for n, case in enumerate(CASES):  # the other halves on four ranks
        found[case] = differences(case, (7, 12), LENGTHS if n % 2 else None)
    return found


def _four(rank):
    found = {}
    for n, case in enumerate(CASES):
        found[case, "even"] = differences(case, (4, 4, 4, 4), None if n % 2 else (16, 0, 7))
        found[case, "uneven"] = differences(case, (1, 9, 3, 6), LENGTHS)
    return found


def _float32(rank):
    return {case: differences(case, (7, 12), LENGTHS, torch.float32, batch_first=True) for case in CASES}


def _bfloat16(rank):
    cases = "windows", "chunks", "scans, LSTM", "scans, GRU", "scans, RNN"
    return {case: differences(case, (7, 12), None, torch.bfloat16) for case in cases}


def close(each, bound, factor=0):
    for found in each:
        for case, errors in found.items():
            assert errors, case
            for name, (ours, theirs) in errors.items():
                assert ours <= factor * theirs + bound, (case, name, ours, theirs)


def test_two_ranks_compute_what_one_does(two):
    close(two["_two"], 1e-12)


@pytest.mark.check
def test_four_ranks_compute_what_one_does(four):
    close(four["_four"], 1e-12)


@pytest.mark.parametrize("name, dtype", [("_float32", torch.float32), ("_bfloat16", torch.bfloat16)])
def test_kernels(two, name, dtype):
    close(two[name], 4 * torch.finfo(dtype).eps, 2)


def _executed(rank):
    with pytest.MonkeyPatch.context() as patch:
        build.on_cpu_tensors(patch)
        cases = "chunks", "windows", "scans, LSTM", "scans, GRU", "scans, RNN", "checked, LSTM"
        return {case: differences(case, (4, 5), (9, 0, 6), torch.float32, backend="cuda") for case in cases}


@pytest.mark.check
@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
def test_cuda_kernels_in_the_executor():
    build.module()  # once, for both
    close(on_ranks(2, _executed)["_executed"], 4 * torch.finfo(torch.float32).eps, 2)


def _rounds(rank):
    """Four ranks of 40 steps, whose last steps alone do not tell where they end."""
    torch.manual_seed(0)
    module = remembering(StableLSTM(I, H, stability=None)).double()
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.01)  # almost all that is remembered, its forget gates say
    x, found = torch.randn(160, B, I, dtype=torch.float64), {}
    truth = module(x)[0].detach()
    mine = slice(40 * rank, 40 * rank + 40)
    sequence_parallel(module, dist.group.WORLD)
    for plan in (
        Verified(1e-4, warmup=4, correct="none"),
        Verified(1e-4, warmup=4),
        Verified(1e-4, warmup=40),
        Verified(1e30, warmup=4),
    ):
        module.plan = plan
        y, _ = module(x[mine])
        y.sum().backward()
        report = module.last_report
        error = float((y - truth[mine]).abs().max())
        layers = report.layers[0], report.backward.layers[0]
        found[str(plan)] = [layer.rounds for layer in layers], report.largest_jump, error, str(report)
    return found


@pytest.mark.check
def test_rounds_of_checked_ranks(four):
    moved = []
    for plain, corrected, long, loose in map(dict.values, four["_rounds"]):
        for (forward, backward), jump, error, _ in (plain, corrected, long):
            assert 1 <= min(forward, backward) and max(forward, backward) <= 4 and jump <= 1e-4 and error < 1e-3
        assert plain[0] == [4, 4] and max(corrected[0]) < 4, (plain, corrected)
        assert long[0] < plain[0] and loose[0] == [1, 1]
        assert "4 rounds over the ranks" in plain[3] and "rounds" not in loose[3]
        moved.append(loose[2])
    assert moved[0] < 1e-12 and min(moved[1:]) > 1e-2  # what is not asked for is not done


def said(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _errors(rank):
    module = sequence_parallel(StableLSTM(I, H, plan=Windowed(3)), dist.group.WORLD)
    x, other = torch.randn(5, B, I), rank == 1
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 3])
    zeros = torch.zeros(1, B, H)
    found = {
        "packed": said(lambda: module(packed if other else x)),
        "batch": said(lambda: module(x[:, : B - other])),
        "features": said(lambda: module(x[..., : I - other])),
        "dtype": said(lambda: module(x.double() if other else x)),
        "no steps": said(lambda: module(x[: 0 if other else 5])),
        "states": said(lambda: module(x, (zeros, zeros[..., : H - other]))),
        "lengths": said(lambda: module(x, lengths=torch.tensor([10, 3, 9 - rank]))),
        "long": said(lambda: module(x, lengths=torch.tensor([11, 3, 3]))),
        "gradients": said(lambda: module(x.clone().requires_grad_(other))),
    }
    module.plan = Verified()
    found["integers"] = said(lambda: module(x.int()))
    module.plan = Windowed(3 + rank)
    found["plans"] = said(lambda: module(x))
    module.plan = {}
    found["recurrent"] = said(lambda: module(x))
    module.plan = Scanned()
    found["no cascade"] = said(lambda: module(x))
    found["no model"] = said(lambda: sequence_parallel(3, dist.group.WORLD))
    found["no group"] = said(lambda: sequence_parallel(module, "time"))
    found["no module"] = said(lambda: sequence_parallel(nn.Linear(2, 2), dist.group.WORLD))
    module.plan = Windowed(3)
    found["in the end"] = said(lambda: module(x))
    return found


def test_errors_come_on_every_rank(two):
    first, second = two["_errors"]
    texts = {
        "packed": "a PackedSequence cannot be shared between ranks",
        "dtype": "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)",
        "features": "input.size(-1) must be equal to input_size",
        "no steps": "every rank's stretch must have a step at least",
        "states": "Expected hidden[1] size (1, 3, 6), got",
    }
    for name, text in texts.items():
        kind, _, message = second[name].partition(": ")
        assert text in message and kind in ("TypeError", "ValueError", "RuntimeError")
        assert first[name].startswith(f"ValueError: sequence_parallel: rank 1 of the group raised {kind}: ")
        assert text in first[name]
    same = {
        "batch": "rank 0: batch 3; rank 1: batch 2",
        "lengths": "rank 0: lengths [10, 3, 9]; rank 1: lengths [10, 3, 8]",
        "long": "lengths must lie in 0..10, got [11, 3, 3]",
        "gradients": "rank 0: gradients of (input, states, parameters) [False,",
        "integers": "RNN input dtype (torch.int32) does not match weight dtype (torch.float32)",
        "plans": "rank 0: plan Windowed(k=3); rank 1: plan Windowed(k=4)",
        "recurrent": "Recurrent() goes from step to step, and cannot run on several ranks at once; give each layer one of Windowed",
        "no cascade": "Scanned() needs a cascade",
        "no model": "model must be an nn.Module, got int",
        "no group": "group must be a ProcessGroup, a DeviceMesh or None, got 'time'",
        "no module": "Linear holds no StableRNN, StableGRU or StableLSTM",
        "in the end": "nothing",
    }
    for name, text in same.items():
        assert first[name] == second[name] and text in first[name], (name, first[name])


def _ways_to_run(rank):
    """Without gradients, in inference mode, compiled, under autocast, copied, and back; without sequences."""
    import copy
    import pickle

    torch.manual_seed(0)
    model = nn.Sequential(StableGRU(I, H, plan=Chunked(4, 3)))
    x = torch.randn(10, B, I)
    mine = slice(5 * rank, 5 * rank + 5)
    h = torch.randn(1, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_h = model[0](x, h)
    whole, _ = model(x)
    stream = model[0].stream()
    assert sequence_parallel(model, dist.group.WORLD) is model
    found = []
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found.append(model(x[mine])[0])
    found += [torch.compile(model, backend="eager")(x[mine])[0], copy.deepcopy(model)(x[mine])[0]]
    with torch.autocast("cpu", torch.bfloat16):
        each = model[0](x[mine], h), torch.compile(model[0], backend="eager")(x[mine], h)
    near = lambda a, b: torch.allclose(a, b, atol=1e-6)  # noqa: E731  float32: products of fewer rows sum in another order
    as_low = [y.dtype is low.dtype and near(y, low[mine]) for y, _ in each]
    as_low += [h_n.dtype is low_h.dtype and near(h_n.detach_(), low_h) for _, h_n in each]
    refused = [said(call) for call in (lambda: pickle.dumps(model), model[0].stream, lambda: stream.push(x[mine]))]
    sequence_parallel(model, None)
    pickle.dumps(model)
    alike = [near(y, whole[mine]) for y in found] + [torch.equal(model(x)[0], whole)]
    lstm = sequence_parallel(StableLSTM(I, H, **BOTH, stability=Cascade(2)), dist.group.WORLD)
    for plan in (Windowed(3), Chunked(4, 3), Scanned(), Verified()):
        lstm.plan = plan
        empty = torch.randn(5, 0, I, requires_grad=True)
        none, (h, c) = lstm(empty)
        (none.sum() + h.sum()).backward()
        alike.append(
            none.shape == (5, 0, 2 * H) and h.shape == c.shape == (4, 0, H) and empty.grad.shape == empty.shape
        )
    return alike, as_low, refused


def test_ways_to_run(two):
    for alike, low, (pickled, *streams) in two["_ways_to_run"]:
        assert alike == [True] * 9 and low == [True] * 4
        assert pickled.startswith("TypeError: a module that shares time with other ranks cannot be pickled")
        for name, text in zip(("stream", "push"), streams, strict=True):
            assert text.startswith(f"ValueError: {name}: the module shares time with other ranks")


def _twice(rank):
    """Gradients of gradients: the loss of the whole has each rank's share, of its times and of the final states."""
    found = {}
    for plan in (Windowed(4), Chunked(4, 3), Scanned(), Verified()):
        torch.manual_seed(0)
        lstm = StableLSTM(I, H, stability=Cascade(3), plan=plan, dtype=torch.float64)
        x = torch.randn(10, B, I, dtype=torch.float64)

        def gradients(x, share, lstm=lstm):
            x = x.clone().requires_grad_()
            y, (h, c) = lstm(x)
            loss = y.pow(3).sum() + share * (h.pow(3).sum() + c.pow(3).sum())
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            lstm.zero_grad()
            dx.square().sum().backward()
            return torch.cat([p.grad.flatten() for p in lstm.parameters()])

        whole = gradients(x, 1 + 2)
        sequence_parallel(lstm, dist.group.WORLD)
        try:
            found[str(plan)] = gradients(x[5 * rank : 5 * rank + 5], 1 + rank)
            dist.all_reduce(found[str(plan)])
            found[str(plan)] = float((found[str(plan)] - whole).abs().max() / whole.abs().max())
        except RuntimeError as error:
            found[str(plan)] = str(error)
    return found


def test_gradients_of_gradients(two):
    for windows, chunks, *others in map(dict.values, two["_twice"]):
        assert max(windows, chunks) < 1e-12
        assert all("differentiate twice" in text for text in others)


def _trained(rank):
    """Gradients under DDP and FSDP2, of which every rank has a part of the batch, and of time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "time"))
    data, time = mesh.get_coordinate()
    many, found = ranks // 2 * B, {"two dimensions": said(lambda: sequence_parallel(StableLSTM(I, H), mesh))}
    for plan in (Chunked(4, 3), Scanned(), Verified(0)):
        torch.manual_seed(0)
        x, target = torch.randn(12, many, I), torch.randn(many, H)
        part = slice(6 * time, 6 * time + 6), slice(data * B, data * B + B)

        def make(plan=plan):
            torch.manual_seed(1)
            return nn.Sequential(StableLSTM(I, H, 2, stability=Cascade(3), plan=plan))

        def loss(
            model, x, target
        ):  # means over what a rank has, and a loss of the final state, the same on all of time
            y, (h, _) = model(x)
            return y.square().mean() + (h[-1] - target).square().mean()

        loss(truth := make(), x, target).backward()
        for kind in ("ddp", "fsdp"):
            model = sequence_parallel(make(), mesh["time"])
            wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model, mesh=mesh)
            loss(wrapped, x[part], target[part[1]]).backward()
            grads = [p.grad.full_tensor() if kind == "fsdp" else p.grad for p in wrapped.parameters()]
            found[f"{kind}, {plan}"] = [
                float((g - p.grad).abs().max() / p.grad.abs().max()) for g, p in zip(grads, truth.parameters())
            ]
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.check)])
def test_beside_ddp_and_fsdp2(ranks, request):
    for found in request.getfixturevalue({2: "two", 4: "four"}[ranks])["_trained"]:
        assert "the mesh must have one dimension, that of time; got 2: take mesh[name]" in found.pop("two dimensions")
        assert len(found) == 6
        for kind, errors in found.items():
            assert len(errors) == 8 and max(errors) <= 20 * torch.finfo(torch.float32).eps, kind


def _absent(rank):
    """A rank that does not come."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    module = sequence_parallel(StableLSTM(I, H, plan=Windowed(3)), group)
    return said(lambda: module(torch.randn(5, B, I))) if rank == 0 else ""


def _dying(rank):
    module = sequence_parallel(StableLSTM(I, H, plan=Windowed(3)), dist.group.WORLD)
    x = torch.randn(5, B, I)
    module(x)
    if rank == 1:
        raise SystemExit
    return said(lambda: module(x))


LOST = ("RuntimeError", "DistBackendError", "DistNetworkError")


def test_a_rank_that_does_not_come_is_an_error(two):
    assert two["_absent"][0].startswith(LOST)


@pytest.mark.check
def test_a_rank_that_dies_is_an_error():
    assert on_ranks(2, _dying)["_dying"][0].startswith(LOST)


def _sent(rank):
    from benchmarks.communication import CASES, formulas, passes

    found = {}
    for name, make in CASES.items():
        module = sequence_parallel(make(), dist.group.WORLD)
        found[name] = [formulas(module), *(passes(module, steps) for steps in (192, 448))]
    return found


@pytest.mark.check
def test_what_is_sent_does_not_grow_with_the_sequence(four):
    for name, (formula, short, long) in four["_sent"][1].items():
        assert short == long == formula, name


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, _two, _float32, _bfloat16, _errors, _ways_to_run, _twice, _trained, _absent)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, _four, _rounds, _trained, _sent)
