"""`stabilize`: what clients have done to their modules before it, and who else holds them."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from stable_rnn import (
    Certified,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    Windowed,
    stabilize,
    unstabilize,
)

X = torch.randn(9, 3, 6, generator=torch.Generator().manual_seed(0))


def tied_layers():
    m = nn.LSTM(6, 6, 2)
    m.weight_hh_l1, m.weight_ih_l1 = m.weight_hh_l0, m.weight_ih_l0
    return m


def tied_directions():
    m = nn.LSTM(6, 6, bidirectional=True)
    m.weight_hh_l0_reverse = m.weight_hh_l0
    return m


def tied_biases():
    m = nn.RNN(6, 6)
    m.bias_hh_l0 = m.bias_ih_l0
    return m


def tied_cell():
    m = nn.LSTMCell(6, 6)
    m.weight_ih, m.bias_hh = m.weight_hh, m.bias_ih
    m.bias_ih.requires_grad_(False)
    return m


def sharing(model):
    """The names of every weight, by its first name."""
    first = {}
    return {name: first.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}


def output(m):
    return m(X[0])[0] if isinstance(m, nn.RNNCellBase) else m(X)[0]


@pytest.mark.parametrize("make", [tied_layers, tied_directions, tied_biases, tied_cell])
def test_shared_weights_stay_shared(make):
    plain = make()
    expected, names, weights = output(plain), sharing(plain), list(plain.parameters())
    m = stabilize(copy.deepcopy(plain), cells=True)
    torch.testing.assert_close(output(m), expected)
    assert sharing(m) == names
    for other in (m.to_torch(), copy.deepcopy(m), stabilize(make(), cells=True)):
        other.load_state_dict(m.state_dict())
        assert sharing(other) == names
        torch.testing.assert_close(output(other), expected)
    back = unstabilize(stabilize(plain, cells=True))
    assert back is plain and all(a is b for a, b in zip(back.parameters(), weights, strict=True))
    torch.testing.assert_close(output(back), expected)


def test_to_torch_keeps_each_weight_as_it_is():
    m = StableLSTM(3, 4, 2, stability=None)
    m.weight_hh_l1 = nn.Parameter(m.weight_hh_l1.detach().double(), requires_grad=False)
    m.bias_ih_l0 = nn.Parameter(m.bias_ih_l0.detach().to("meta"))
    plain = m.to_torch()
    for name, own in m.named_parameters():
        copied = getattr(plain, name)
        assert (copied.dtype, copied.device, copied.requires_grad) == (
            own.dtype,
            own.device,
            own.requires_grad,
        ) and copied is not own


def test_a_weight_shared_between_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(6, 6), nn.LSTM(6, 6)
            self.again = self.first
            self.second.weight_hh_l0 = self.first.weight_hh_l0

        def forward(self, x):
            return self.again(self.second(self.first(x)[0])[0])[0]

    net = Net()
    with torch.no_grad():
        for w in net.parameters():
            w.mul_(20)
        net.second.bias_ih_l0[6:12] = -9.0  # less of the forget gate's room is taken here than in the other module
    expected, names = net(X), sharing(net)
    torch.testing.assert_close(stabilize(net)(X), expected)
    assert sharing(net) == names and net.again is net.first
    stabilize(unstabilize(net), stability=Certified(), project=True)
    assert sharing(net) == names and all(m.certificate().rate <= 0.99 for m in (net.first, net.second))


@pytest.mark.parametrize(
    "plain,ours,options",
    [
        (nn.LSTM, StableLSTM, {}),
        (nn.LSTM, StableLSTM, dict(proj_size=2)),
        (nn.RNN, StableRNN, {}),
        (nn.RNN, StableRNN, dict(nonlinearity="relu")),
        (nn.LSTMCell, StableLSTMCell, {}),
        (nn.RNNCell, StableRNNCell, dict(nonlinearity="relu")),
        (nn.GRU, StableGRU, {}),
        (nn.GRUCell, StableGRUCell, {}),
    ],
)
def test_nothing_is_missing_and_nothing_is_left(plain, ours, options):
    """A swapped module has the attributes of one that was made so, and one swapped back those of torch's."""
    a, b = stabilize(plain(3, 4, **options), cells=True), ours(3, 4, **options, stability=None)
    assert type(a) is ours and vars(a).keys() == vars(b).keys() and repr(a) == repr(b)
    assert {n: v for n, v in vars(a).items() if isinstance(v, str)} == {
        n: v for n, v in vars(b).items() if isinstance(v, str)
    }
    a, b = unstabilize(b), plain(3, 4, **options)
    assert type(a) is plain and vars(a).keys() == vars(b).keys() and repr(a) == repr(b)


def test_what_clients_have_added_stays():
    plain, seen = nn.LSTM(6, 6), []
    plain.qconfig, plain.output_dim = "some", 6
    plain.register_buffer("scale", torch.ones(2))
    plain.register_module("extra", nn.Linear(1, 1))
    plain.weight_ih_l0.requires_grad_(False)
    handles = [
        plain.register_forward_hook(lambda m, a, y: seen.append("forward")),
        plain.register_forward_pre_hook(lambda m, a: seen.append("before")),
        plain.register_full_backward_hook(lambda m, a, b: seen.append("backward")),
        plain.register_state_dict_post_hook(lambda m, d, p, meta: seen.append("state")),
        plain.register_load_state_dict_post_hook(lambda m, keys: seen.append("load")),
    ]
    net = nn.Sequential(plain.eval())
    tensors = dict(net.state_dict(keep_vars=True))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for change in (stabilize, unstabilize):
        m = change(net)[0]
        assert (
            m is plain
            and (m.qconfig, m.output_dim, m.training) == ("some", 6, False)
            and not m.weight_ih_l0.requires_grad
        )
        seen.clear()
        assert all(t is tensors[name] for name, t in net.state_dict(keep_vars=True).items())
        net.load_state_dict(net.state_dict())
        net(X)[0].sum().backward()
        assert seen == ["state", "state", "load", "before", "forward", "backward"]
        optimizer.step()
    for handle in handles:
        handle.remove()
    seen.clear()
    stabilize(net)(X)
    assert seen == []


# ---- wrappers, and others who hold the module


class Holder(nn.Module):
    """Runs its LSTM from where the module tree does not show it."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6)
        self.steps = [self.lstm]
        self.bound = self.lstm.__call__
        object.__setattr__(self, "hidden", self.lstm)

    def forward(self, x):
        return self.steps[0](x)[0] + self.hidden(x)[0] + self.bound(x)[0]


class Plain(nn.Module):
    def __init__(self, wrap=lambda m: m):
        super().__init__()
        self.lstm = wrap(nn.LSTM(6, 6))

    def forward(self, x):
        return self.lstm(x)[0]


def compiled_in_place(m):
    m.compile(backend="eager")
    return m


def both_ways(net, plain, times=1):
    """Runs, is swapped, runs windows of 2 inputs, is swapped back and runs as before."""
    with torch.no_grad():
        before = net(X)
        windows = times * torch.stack([plain(X[max(0, t - 1) : t + 1])[0][-1] for t in range(len(X))])
        assert stabilize(net, plan=Windowed(2)) is net
        torch.testing.assert_close(net(X), windows)
        assert not torch.allclose(before, windows, atol=1e-3)
        torch.testing.assert_close(unstabilize(net)(X), before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), compiled_in_place])
@pytest.mark.parametrize("inside", [False, True])
def test_wrapped(wrap, inside):
    torch._dynamo.reset()
    net = Plain(wrap) if inside else wrap(Plain())
    plain = nn.LSTM(6, 6)
    plain.load_state_dict({name.rpartition(".")[2]: w for name, w in net.state_dict().items()})
    both_ways(net, plain)


def test_held_elsewhere():
    net = Holder()
    both_ways(net, copy.deepcopy(net.lstm), times=3)


def test_a_compiled_root():
    torch._dynamo.reset()
    net = torch.compile(nn.LSTM(6, 6), backend="eager")
    plain = copy.deepcopy(net._orig_mod)
    expected = plain(X)[0]
    stabilize(net, plan=Windowed(1))
    assert not torch.allclose(net(X)[0], expected, atol=1e-3) and type(net._orig_mod) is StableLSTM
    torch.testing.assert_close(unstabilize(net)(X)[0], expected)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_data_parallel_processes(alone):
    from torch.nn.parallel import DistributedDataParallel

    net = Plain()
    plain = copy.deepcopy(net.lstm)
    both_ways(DistributedDataParallel(net), plain)


def test_sharded(alone):
    """Parents may be sharded before; a module that `fully_shard` has been called on has its class, and is left alone by name."""
    from torch.distributed.fsdp import fully_shard

    net = Plain()
    plain = copy.deepcopy(net.lstm)
    both_ways(fully_shard(net, mesh=alone), plain)
    net = Plain()
    fully_shard(net.lstm, mesh=alone)
    with pytest.raises(ValueError, match="lstm is nn.LSTM sharded by fully_shard"):
        stabilize(net)
    net = stabilize(Plain())
    fully_shard(net.lstm, mesh=alone)
    net(X)
    with pytest.raises(ValueError, match="lstm is StableLSTM sharded by fully_shard"):
        unstabilize(net)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_flattened(alone):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = Plain()
    plain = copy.deepcopy(net.lstm)
    both_ways(FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu")), plain)
    net = FullyShardedDataParallel(Plain(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="lstm is an nn.LSTM with computed weights: weight_ih_l0.*before .*FSDP"):
        stabilize(net)


# ---- what is left alone, by name


class LSTM(nn.LSTM):
    pass


def with_a_name(m, name):
    setattr(m, name, "mine")
    return m


def with_a_forward(m):
    m.forward = torch.compile(m.forward, backend="eager")
    return m


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make,text",
    [
        (lambda: LSTM(6, 6), r"test_stabilize\.LSTM, a subclass of nn\.LSTM"),
        (lambda: nn.LSTMCell(6, 6), r"an nn.LSTMCell \(cells=True makes it a StableLSTMCell\)"),
        (lambda: nn.RNNCell(6, 6), r"an nn.RNNCell \(cells=True makes it a StableRNNCell\)"),
        (lambda: nn.GRUCell(6, 6), r"an nn.GRUCell \(cells=True makes it a StableGRUCell\)"),
        (lambda: with_a_forward(nn.LSTM(6, 6)), r"an nn.LSTM with a forward of its own.*del module\.forward"),
        (
            lambda: with_a_name(nn.LSTM(6, 6), "plan"),
            r"an nn.LSTM with attributes of its own named plan, .*\(rename them\)",
        ),
        (lambda: torch.jit.script(nn.LSTM(6, 6)), "a TorchScript LSTM, compiled already"),
        (lambda: torch.jit.trace(nn.LSTM(6, 6), X), "a TorchScript LSTM, compiled already"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(6, 6), "weight_hh_l0"),
            "a parametrized nn.LSTM .*remove_parametrizations",
        ),
        (
            lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(6, 6)))[0],
            "a quantized LSTM, torch.ao.nn.quantized.dynamic",
        ),
        (lambda: torch.ao.nn.quantizable.LSTM(6, 6), "a quantized LSTM, torch.ao.nn.quantizable"),
    ],
)
def test_left_alone_by_name(make, text):
    net = nn.Sequential(nn.LSTM(6, 6), make())
    left, kind = net[1], type(net[1])
    with pytest.warns(UserWarning, match=f"stabilize: 1 is {text}.* left alone"):
        stabilize(net)
    assert type(net[0]) is StableLSTM and net[1] is left and type(left) is kind
    with pytest.raises(ValueError, match=f"holds no nn.RNN, nn.GRU or nn.LSTM that can be swapped: lstm is {text}"):
        stabilize(Plain(lambda m: left))
    net = nn.Sequential(nn.LSTM(6, 6), left)
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        stabilize(net)
    assert type(net[0]) is nn.LSTM


def test_a_second_time():
    with pytest.raises(ValueError, match="that can be swapped: lstm is a StableLSTM already"):
        stabilize(stabilize(Plain()))


def test_a_model_that_is_a_script():
    with pytest.raises(ValueError, match="lstm is a TorchScript LSTM"):
        stabilize(torch.jit.script(Plain()))


def test_cells():
    net = nn.ModuleDict({"a": nn.LSTMCell(6, 6), "b": nn.RNNCell(6, 6, nonlinearity="relu"), "c": nn.GRUCell(6, 6)})
    net["d"] = nn.LSTM(6, 6)
    run = lambda: [net["a"](X[0])[0], net["b"](X[0]), net["c"](X[0]), net["d"](X)[0]]  # noqa: E731
    expected = run()
    stabilize(net, stability=Certified(), cells=True)
    assert [type(m) for m in net.values()] == [StableLSTMCell, StableRNNCell, StableGRUCell, StableLSTM]
    for made, right in zip(run(), expected, strict=True):
        torch.testing.assert_close(made, right)
    for name in "abc":
        net[name].project_()
        assert net[name].certificate().rate <= 0.99
    with pytest.raises(ValueError, match="holds no nn.RNN, nn.GRU, nn.LSTM or cell"):
        stabilize(nn.Linear(1, 1), cells=True)


def test_projection_needs_a_set():
    net = Plain()
    with pytest.raises(ValueError, match="project=True needs a set"):
        stabilize(net, project=True)
    assert type(net.lstm) is nn.LSTM


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(6, 6, 2, bidirectional=True, proj_size=3), lambda: nn.RNN(6, 6), lambda: nn.GRU(6, 6, 2)]
)
def test_the_default_changes_nothing(make):
    m = make()
    plain, weights = copy.deepcopy(m), {name: w.clone() for name, w in m.state_dict().items()}
    with torch.no_grad():
        for w in m.parameters():
            w.mul_(3)
        plain.load_state_dict(m.state_dict())
    weights = {name: w.clone() for name, w in m.state_dict().items()}
    stabilize(m)
    assert m.stability is None and all(torch.equal(w, weights[name]) for name, w in m.state_dict().items())
    torch.testing.assert_close(m(X)[0], plain(X)[0])
    packed = pack_sequence([X[:9, 0], X[:4, 1]])
    torch.testing.assert_close(m(packed)[0].data, plain(packed)[0].data)
