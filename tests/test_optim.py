"""`project_after_step`: the set is kept while a model trains."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from stable_rnn import Certified, ForgetCap, StableLSTM, StableLSTMCell, StableRNN, project_after_step


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second, self.out = StableLSTM(3, 12, **options), StableRNN(12, 12), nn.Linear(12, 1)

    def forward(self, x):
        return self.out(self.second(self.first(x)[0])[0])


def train(model, optimizer, steps=15):
    for _ in range(steps):
        x = torch.rand(12, 4, 3)
        optimizer.zero_grad()
        (model(x) - x.cumsum(0).mean(-1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("certify", [False, True])
def test_the_set_is_kept(certify):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    project_after_step(optimizer, model, certify=certify)
    train(model, optimizer)
    for module in (model.first, model.second):
        assert module.certificate().rate <= (0.99 if certify else 1.0)


def test_every_other_step():
    model, inside = StableRNN(2, 4, stability=Certified(0.5)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    project_after_step(optimizer, model, certify=True, every=3)
    for _ in range(6):
        model.weight_hh_l0.grad = -torch.eye(4)
        optimizer.step()
        inside.append(model.certificate().rate <= 0.5)
    assert inside == [False, False, True] * 2
    project_after_step(optimizer, model, every=np.int64(2))


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_every_is_a_count(every):
    model = StableRNN(2, 4)
    with pytest.raises((TypeError, ValueError), match=f"every must be .*, got {every}"):
        project_after_step(torch.optim.SGD(model.parameters(), lr=1.0), model, every=every)


def test_without_it_the_set_is_left():
    model = Model()
    handle = project_after_step(torch.optim.Adam(model.parameters(), lr=0.05), model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    handle.remove()
    train(model, optimizer)
    assert not model.first.certificate().stable and not model.second.certificate().stable


def test_removal():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.first.stability = type("Counting", (Certified,), {"project_": lambda *a, **k: calls.append(k["certify"])})()
    handle = project_after_step(optimizer, model)
    train(model, optimizer, 2)
    handle.remove()
    train(model, optimizer, 2)
    assert calls == [False, False]


def test_a_module_that_loses_its_set_is_left_alone():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    project_after_step(optimizer, model)
    model.first.stability = None
    with torch.no_grad():
        model.first.weight_hh_l0.mul_(100), model.second.weight_hh_l0.mul_(100)
    before = model.first.weight_hh_l0.clone()
    train(model, optimizer, 1)
    assert torch.equal(model.first.weight_hh_l0, before) and model.second.weight_hh_l0.abs().max() < 2


def test_the_model_itself_and_cells():
    for module in (StableLSTM(3, 4), StableLSTMCell(3, 4), StableLSTM(3, 4, stability=ForgetCap(0.9))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        project_after_step(optimizer, module)
        optimizer.step()


def test_frozen_modules_are_skipped_while_they_are_frozen():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    project_after_step(optimizer, model)
    model.first.requires_grad_(False)
    model.second.weight_hh_l0.requires_grad_(False)  # all that an RNN's projection writes
    before = {}
    with torch.no_grad():
        for module in (model.first, model.second):
            before[module] = module.weight_hh_l0.mul_(100).clone()
    train(model, optimizer, 1)
    assert all(torch.equal(module.weight_hh_l0, weights) for module, weights in before.items())
    model.first.bias_hh_l0.requires_grad_(True)
    train(model, optimizer, 1)
    assert not torch.equal(model.first.weight_hh_l0, before[model.first])


def test_computed_weights_are_refused_at_once():
    model = Model()
    nn.utils.parametrizations.weight_norm(model.second, "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 of .*RNN is computed from other parameters"):
        project_after_step(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_errors():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Model"):
        project_after_step(model, optimizer)
    with pytest.raises(TypeError, match="model must be an nn.Module, got SGD"):
        project_after_step(optimizer, optimizer)
    with pytest.raises(ValueError, match="LSTM holds no module with a stable set"):
        project_after_step(optimizer, nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="no module with a stable set"):
        project_after_step(optimizer, StableLSTM(3, 4, stability=None))


# ---- optimizers as people have them


def push(model, size=1.0):
    """Gradients that lead out of the sets."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * size


def projects(step, model, size=1.0):
    """Whether the model is in its sets after `step()`, taken from far outside."""
    push(model, size)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(50)
    step()
    return all(
        module.certificate().rate <= 0.99 for module in model.modules() if isinstance(module, (StableLSTM, StableRNN))
    )


def optimizers():
    for name in (
        "SGD",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "Adagrad",
        "Adadelta",
        "ASGD",
        "Adafactor",
    ):
        if hasattr(torch.optim, name):
            yield name, lambda p, name=name: getattr(torch.optim, name)(p, 0.1)
    for option in ("foreach", "fused"):
        yield f"Adam {option}", lambda p, option=option: torch.optim.Adam(p, 0.1, **{option: True})


@pytest.mark.parametrize("make", dict(optimizers()).values(), ids=dict(optimizers()))
def test_the_hook_runs_for_every_optimizer_of_torch(make):
    model = nn.Sequential(StableLSTM(3, 4))
    optimizer = make(model.parameters())
    project_after_step(optimizer, model, certify=True)
    assert projects(optimizer.step, model)


def test_lbfgs_is_projected_after_the_step_and_not_within():
    model, within = StableRNN(2, 4, stability=Certified(0.5)), []
    optimizer = torch.optim.LBFGS(model.parameters(), 1.0, max_iter=4)
    project_after_step(optimizer, model, certify=True)

    def closure():
        optimizer.zero_grad()
        within.append(float(torch.linalg.matrix_norm(model.weight_hh_l0.detach(), 2)))
        loss = (model.weight_hh_l0 - 3 * torch.eye(4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert max(within) > 1 and model.certificate().rate <= 0.5


def test_schedulers_and_loaded_states_keep_the_hook():
    model = nn.Sequential(StableLSTM(3, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    project_after_step(optimizer, model, certify=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert projects(optimizer.step, model)
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert projects(optimizer.step, model)


def test_copies_of_an_optimizer_have_no_hook_until_they_get_one():
    model = nn.Sequential(StableLSTM(3, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    project_after_step(optimizer, model, certify=True)
    for copied in (lambda pair: copy.deepcopy(pair), lambda pair: pickle.loads(pickle.dumps(pair))):
        twin, other = copied((model, optimizer))
        assert not projects(other.step, twin)
        project_after_step(other, twin, certify=True)
        assert projects(other.step, twin)
    assert projects(optimizer.step, model)


def test_a_step_that_the_scaler_skips_is_not_followed_by_a_projection():
    model = nn.Sequential(StableLSTM(3, 4))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    project_after_step(optimizer, model, certify=True)
    scaler.scale(model(torch.randn(3, 2, 3))[0].sum()).backward()
    assert not projects(lambda: scaler.step(optimizer), model, size=float("inf"))
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model(torch.randn(3, 2, 3))[0].sum()).backward()
    assert projects(lambda: (scaler.step(optimizer), scaler.update()), model)


def test_a_compiled_step_runs_the_projection_uncompiled():
    """Traced, it would be cut into dozens of graphs, and compiled anew for other shapes."""
    from torch._dynamo.testing import CompileCounter

    model, counter = nn.Sequential(StableLSTM(3, 4), StableRNN(4, 5)), CompileCounter()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    project_after_step(optimizer, model, certify=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = torch.compile(lambda: optimizer.step(), backend=counter)
        assert projects(step, model) and projects(step, model)
    assert counter.frame_count <= 2


class Around(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer is made: torch's __init__ is never called, and a step may be left out."""

    def __init__(self, optimizer):
        self.optimizer, self.sync = optimizer, True

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        if self.sync:
            self.optimizer.step(closure)


def test_wrappers_that_are_known_are_seen_through():
    model = nn.Sequential(StableLSTM(3, 4))
    wrapped = type("AcceleratedOptimizer", (Around,), {"__module__": "accelerate.optimizer"})(
        torch.optim.Adam(model.parameters(), 0.1)
    )
    handle = project_after_step(wrapped, model, certify=True)
    assert projects(wrapped.step, model)
    wrapped.sync = False
    assert not projects(wrapped.step, model)
    wrapped.sync = True
    handle.remove()
    assert not projects(wrapped.step, model)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(StableLSTM(3, 4))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 0.1))
    project_after_step(optimizer, model, certify=True)
    ends = []
    for _ in range(4):
        with accelerator.accumulate(model):
            ends.append(projects(optimizer.step, model))
    assert ends == [False, True] * 2


def test_wrappers_that_are_not_known_are_refused_with_the_way_out():
    """What they do after the inner step may undo the projection: master weights copied back, slow weights mixed in."""
    model = nn.Sequential(StableLSTM(3, 4))
    inner = torch.optim.Adam(model.parameters(), 0.1)
    with pytest.raises(
        TypeError,
        match=r"Around runs no step hooks.*pass the Adam that it holds \(.optimizer\) if Around moves no weight",
    ):
        project_after_step(Around(inner), model)
    plain = type("FP16_Optimizer", (), {"optim": inner})()
    with pytest.raises(
        TypeError,
        match=r"must be a torch.optim.Optimizer, got FP16_Optimizer; pass the Adam that it holds \(.optim\) if",
    ):
        project_after_step(plain, model)
    own = type("Own", (torch.optim.SGD,), {"step": lambda self, closure=None: torch.optim.SGD.step(self, closure)})
    optimizer = own(model.parameters(), 0.1)  # torch's __init__ puts the hooks around any step
    project_after_step(optimizer, model, certify=True)
    assert projects(optimizer.step, model)


def test_weights_that_cannot_be_written_are_refused_at_once():
    model = nn.Sequential(StableLSTM(3, 4))
    model[0].weight_hh_l0 = nn.Parameter(torch.ones(1, 4).expand(16, 4))
    with pytest.raises(ValueError, match="weight_hh_l0 overlaps itself"):
        project_after_step(torch.optim.SGD(model.parameters(), 0.1), model)
