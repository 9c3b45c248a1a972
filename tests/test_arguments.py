"""Weights and states that do not fit: an error that names them on every path, and for states the exception of torch's own modules."""

import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pack_sequence

from stable_rnn import (
    Chunked,
    Recurrent,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Verified,
    Windowed,
    _native,
)

PLANS = [Recurrent(), Windowed(3), Chunked(4, 2), Verified(chunk=4, warmup=2)]
BACKENDS = ["auto", "reference"] + (["cpu"] if _native.lib else [])
FAULTS = {
    "meta": lambda w: w.to("meta"),
    "float64": lambda w: w.double(),
    "bfloat16": lambda w: w.bfloat16(),
    "integers": lambda w: w.long(),
    "complex": lambda w: w.to(torch.complex64),
    "sparse": lambda w: w.to_sparse(),
    "one": lambda w: w[:1],
    "scalar": lambda w: w[:1].sum(),
    "more": lambda w: torch.cat([w, w]),
    "dimension": lambda w: w[None],
    "transposed": lambda w: w.mT if w.dim() > 1 else w[:, None],
}
PACKED = pack_sequence([torch.randn(5, 6), torch.randn(2, 6)])
CALLS = {
    "padded": lambda m: m(torch.randn(5, 2, 6)),
    "unbatched": lambda m: m(torch.randn(5, 6)),
    "packed": lambda m: m(PACKED),
    "lengths": lambda m: m(torch.randn(5, 2, 6), lengths=torch.tensor([5, 2])),
    "one step": lambda m: m(torch.randn(1, 1, 6)),
    "vmap": lambda m: vmap(lambda x: m(x)[0])(torch.randn(3, 5, 2, 6)),
}


def raises(name, run, gradient=True):
    with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match=rf"^{name} is .*; expected"):
        run()


def set_weight(m, name, w):
    """Without the modules' own checks of what they are given, as `load_state_dict(assign=True)` does."""
    m._parameters[name] = nn.Parameter(w, requires_grad=w.is_floating_point())
    if isinstance(m, nn.RNNBase):
        m._flat_weights = [m._parameters[n] for n in m._flat_weights_names]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights(backend, plan, fault):
    """Every weight, every way of calling, with gradients and without. (The first weight's dtype is compared to the input's by torch.)"""
    for cls, options in (
        (StableRNN, {}),
        (StableLSTM, {}),
        (StableGRU, {}),
        (StableLSTM, dict(proj_size=3, num_layers=2, bidirectional=True)),
    ):
        for name, w in cls(6, 6, **options).state_dict().items():
            bad = FAULTS[fault](w)
            if bad.shape == w.shape and bad.dtype == w.dtype and bad.device == w.device and bad.layout == w.layout:
                continue  # a square matrix, transposed
            m = cls(6, 6, **options, plan=plan, backend=backend, stability=None)
            set_weight(m, name, bad)
            for gradient in (True, False):
                for call in CALLS if options == {} else ("padded", "packed"):
                    if name == "weight_ih_l0" and bad.dtype != w.dtype:
                        with pytest.raises(ValueError, match="does not match weight dtype"):
                            CALLS[call](m)
                    else:
                        raises(name, lambda call=call, m=m: CALLS[call](m), gradient)


@pytest.mark.parametrize("fault", ["meta", "float64", "complex", "sparse", "one"])
def test_weights_of_torchs_own_recurrence(fault):
    for name, w in nn.LSTM(6, 6).state_dict().items():
        m = StableLSTM(6, 6, backend="torch", stability=None)
        set_weight(m, name, FAULTS[fault](w))
        for call in set(CALLS) - {"lengths", "vmap"}:
            with pytest.raises(
                (RuntimeError, ValueError), match=f"^{name} is .*; expected|does not match weight dtype"
            ):
                CALLS[call](m)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_under_autocast(backend):
    """What autocast converts may be of any of its dtypes, as in nn.LSTM; nothing else."""
    for name, w in nn.LSTM(6, 6).state_dict().items():
        for fault, change in FAULTS.items():
            bad = change(w)
            if bad.shape == w.shape and bad.dtype == w.dtype and bad.device == w.device and bad.layout == w.layout:
                continue
            m = StableLSTM(6, 6, backend=backend, stability=None)
            set_weight(m, name, bad)
            for call in ("padded", "packed"):
                with torch.autocast("cpu", torch.bfloat16):
                    if fault == "bfloat16":
                        assert CALLS[call](m)[0].data.isfinite().all()
                    else:
                        raises(name, lambda call=call, m=m: CALLS[call](m))


@pytest.mark.parametrize("cls,plain", [(StableRNN, nn.RNN), (StableLSTM, nn.LSTM), (StableGRU, nn.GRU)])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_partly_loaded_module(cls, plain, gradient):
    """Made on the meta device, loaded from a checkpoint that lacks a weight."""
    for missing in plain(6, 6, num_layers=2).state_dict():
        m = cls(6, 6, num_layers=2, stability=None, device="meta")
        m.load_state_dict(
            {k: v for k, v in plain(6, 6, num_layers=2).state_dict().items() if k != missing}, strict=False, assign=True
        )
        for plan in PLANS:
            m.plan = plan
            raises(missing, lambda m=m: m(torch.randn(5, 2, 6)), gradient)


def test_weights_in_graphs():
    """Compiled; the module and its substituted weights."""
    m = StableLSTM(6, 6, stability=None)
    weights = {name: w.detach() for name, w in m.named_parameters()}
    for name, fault in (("bias_hh_l0", "one"), ("weight_hh_l0", "meta"), ("bias_ih_l0", "float64")):
        bad = weights | {name: FAULTS[fault](weights[name])}
        run = lambda x, bad=bad: functional_call(m, bad, (x,))[0]  # noqa: E731
        raises(name, lambda run=run: run(torch.randn(5, 2, 6)))
        torch._dynamo.reset()
        raises(name, lambda run=run: torch.compile(run, backend="aot_eager")(torch.randn(5, 2, 6)))
    many = {
        k: torch.stack([w, 2 * w]) for k, w in weights.items()
    }  # one of each for every sample: their shapes inside are as ever
    x = torch.randn(5, 2, 6)
    y = vmap(lambda w: functional_call(m, w, (x,))[0])(many)
    torch.testing.assert_close(y[0], m(x)[0])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [StableRNNCell, StableLSTMCell, StableGRUCell])
def test_weights_of_cells(cls, backend, fault):
    for name, w in cls(5, 6).state_dict().items():
        bad = FAULTS[fault](w)
        if bad.shape == w.shape and bad.dtype == w.dtype and bad.device == w.device and bad.layout == w.layout:
            continue
        for gradient in (True, False):
            m = cls(5, 6, backend=backend, stability=None)
            set_weight(m, name, bad)
            for x in (torch.randn(2, 5), torch.randn(5)):
                said = f"^{name} is .*; expected|input dtype .* weight dtype"
                with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match=said):
                    m(x)


def test_a_missing_weight():
    for m, x in ((StableLSTM(6, 6), torch.randn(5, 2, 6)), (StableRNNCell(6, 6), torch.randn(2, 6))):
        name = next(name for name in m.state_dict() if name.startswith("bias_hh"))
        set_weight(m, name, torch.zeros(6))
        m._parameters[name] = None
        with pytest.raises(TypeError, match=f"^{name} must be a tensor, got NoneType"):
            m(x)


def parts(shape):
    """What may stand where a state of this shape belongs."""
    h = torch.zeros(shape)
    return {
        "0-D": torch.zeros(()),
        "1-D": torch.zeros(6),
        "2-D": torch.zeros(3, 6),
        "3-D": torch.zeros(1, 3, 6),
        "4-D": torch.zeros(1, 1, 3, 6),
        "wide": torch.zeros(*shape[:-1], 7),
        "batch": torch.zeros(1, 2, 6),
        "float64": h.double(),
        "integers": h.long(),
        "bfloat16": h.bfloat16(),
        "complex": h.to(torch.complex64),
        "meta": h.to("meta"),
        "None": None,
        "int": 3,
        "float": 1.0,
        "str": "ab",
        "list": [],
        "dict": {},
    }


def states(shape):
    """Name -> hx, of all kinds, alone and in pairs."""
    h = torch.zeros(shape)
    found = {
        "three": (h, h, h),
        "one": (h,),
        "none": (),
        "list of three": [h, h, h],
        "list of one": [h],
        "nested": ((h, h), (h, h)),
        "dict": {"h": h, "c": h},
        "array": h.numpy(),
        "bool": True,
    }
    for name, part in parts(shape).items():
        found |= {} if part is None else {name: part}
        found |= {f"({name}, h)": (part, h), f"(h, {name})": (h, part), f"({name}, {name})": (part, part)}
    return found


def error_of(m, x, hx):
    try:
        m(x, hx)
    except Exception as error:
        return error
    return None


def words(hx):
    """Ways to say what hx is."""
    if isinstance(hx, torch.Tensor):
        size = list(hx.shape)
        return [
            str(tuple(size)),
            str(size),
            str([*size[:1], 1, *size[1:]]),
            f"{hx.dim()}-D",
            f"{hx.dim()}D",
            str(hx.dtype),
            *(f"{word} {part}" for part in size for word in ("size", "got")),
        ]
    if isinstance(hx, (tuple, list)):
        return [f"{type(hx).__name__} of {len(hx)}", *(word for part in hx for word in words(part))]
    return [type(hx).__name__]


def compare(theirs, ours, x, shape, accepted=()):
    """The same exception for every wrong state. `accepted`: what torch takes, and ours does not."""
    refused = 0
    for name, hx in states(shape).items():
        expected, found = error_of(theirs, x, hx), error_of(ours, x, hx)
        if expected is None:
            assert found is None or any(re.search(pattern, name) for pattern in accepted), f"{name}: {found!r}"
            continue
        refused += 1
        assert type(found) is type(expected), f"{name}: {found!r} for {expected!r}"
        assert any(word in str(found) for word in words(hx)), f"{name}: {found!r} does not say what was given"
    assert refused > 20


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("theirs,ours", [(nn.RNN, StableRNN), (nn.LSTM, StableLSTM), (nn.GRU, StableGRU)])
def test_states(theirs, ours, backend, gradient):
    """Unbatched, nn.LSTM drops a third state; ours says so."""
    with torch.set_grad_enabled(gradient):
        for shape, x in (((1, 3, 6), torch.randn(5, 3, 4)), ((1, 6), torch.randn(5, 4))):
            compare(theirs(4, 6), ours(4, 6, backend=backend), x, shape, accepted=["three"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_packed_input(backend):
    """nn.RNN checks shapes; nn.LSTM does not, and reads past a state's end (so not every wrong state can be tried on it)."""
    x = pack_sequence([torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 4)])
    unsorted = pack_sequence([torch.randn(2, 4), torch.randn(3, 4), torch.randn(2, 4)], enforce_sorted=False)
    h, plain, m = torch.zeros(1, 3, 6), nn.LSTM(4, 6), StableLSTM(4, 6, backend=backend)
    safe = {name: part for name, part in parts((1, 3, 6)).items() if name not in ("3-D", "4-D")}
    for packed in (x, unsorted):
        tries = [(h, h, h), (h,), (), [h], ((h, h), (h, h)), {"h": h, "c": h}, 3, True]
        tries += [h, torch.zeros(6), torch.zeros(3, 6), torch.zeros(2, 3, 6)]
        tries += [pair for part in safe.values() for pair in ((part, h), (h, part))]
        for hx in tries:
            expected, found = error_of(plain, packed, hx), error_of(m, packed, hx)
            if expected is None:  # it promotes dtypes of c_0, and drops a third state
                assert found is None or isinstance(found, RuntimeError)
            else:
                assert type(found) is type(expected), f"{found!r} for {expected!r}"
    wrong = [torch.zeros(shape) for shape in ((6,), (3, 6), (1, 2, 6), (1, 4, 6), (2, 3, 6))]
    for hx in (*wrong, h.double(), (h, h), [h], 3):
        for theirs, ours in ((nn.RNN, StableRNN), (nn.GRU, StableGRU)):
            expected, found = error_of(theirs(4, 6), x, hx), error_of(ours(4, 6, backend=backend), x, hx)
            assert type(found) is type(expected) and expected is not None
    for cls in (StableRNN, StableGRU, StableLSTM):  # torch takes the first three of four states
        hx = torch.zeros(1, 4, 6)
        with pytest.raises(RuntimeError, match=r"size \(1, 3, 6\), got \[1, 4, 6\]"):
            cls(4, 6, backend=backend)(unsorted, (hx, hx) if cls is StableLSTM else hx)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "theirs,ours", [(nn.RNNCell, StableRNNCell), (nn.LSTMCell, StableLSTMCell), (nn.GRUCell, StableGRUCell)]
)
def test_states_of_cells(theirs, ours, backend, gradient):
    """nn.LSTMCell promotes dtypes of c; unbatched, it drops a third state and takes the first two rows of one tensor."""
    with torch.set_grad_enabled(gradient):
        for shape, x in (((3, 6), torch.randn(3, 4)), ((6,), torch.randn(4))):
            compare(
                theirs(4, 6),
                ours(4, 6, backend=backend),
                x,
                shape,
                accepted=[r"^\(h, (float64|integers|bfloat16|complex)", "three", "^2-D", "^batch"],
            )


@pytest.mark.parametrize("cls", [StableRNNCell, StableLSTMCell, StableGRUCell])
@pytest.mark.skipif(not _native.lib, reason="addresses are taken for the compiled kernels only")
def test_freed_memory(cls):
    """Kernels take the address 0 for an absent tensor, and so would compute without a bias that FSDP has freed."""
    for name in cls(5, 6).state_dict():
        cell = cls(5, 6, stability=None)
        cell.get_parameter(name).untyped_storage().resize_(0)
        with torch.no_grad(), pytest.raises(RuntimeError, match="has no memory"):
            cell(torch.randn(2, 5))
