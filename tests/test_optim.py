"""`project_after_step`: the set is kept while a model trains."""

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
