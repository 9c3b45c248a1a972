"""Weights of kinds that a module is not made with: some on the meta device, several dtypes or devices, none at all, other shapes."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stable_rnn import (
    Certified,
    StableGRU,
    StableGRUCell,
    StableLSTM,
    StableLSTMCell,
    StableRNN,
    StableRNNCell,
    certificate,
)


def spoiled(module, scale=5.0):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * scale)
    return module


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def refused(module, text, error=ValueError, certified=True):
    before = snapshot(module)
    for call in (
        lambda: module.project_(),
        lambda: module.project_(certify=False),
        *([lambda: certificate(module)] if certified else []),
    ):
        with pytest.raises(error, match=text):
            call()
    assert all(p.is_meta or torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1", "bias_hh_l1"])
def test_one_weight_without_values(name):
    module = spoiled(StableLSTM(3, 4, 2))
    setattr(module, name, nn.Parameter(getattr(module, name).detach().to("meta")))
    refused(module, f"{name} is on the meta device and holds no values")


def test_several_devices():
    module = StableLSTM(3, 4)
    with FakeTensorMode():  # a device that need not be there
        module.bias_hh_l0 = nn.Parameter(torch.empty(16, device="cuda:1"))
    for certify in (False, True):
        with pytest.raises(ValueError, match="on one device, got weight_ih_l0 on cpu, .*bias_hh_l0 on cuda:1"):
            module.project_(certify=certify)


@pytest.mark.parametrize("norm", ["2", "inf", "radius"])
@pytest.mark.parametrize("make", [StableLSTM, StableRNN, StableGRU])
def test_several_dtypes(make, norm):
    kinds = {
        "weight_ih": torch.float64,
        "weight_hh": torch.bfloat16,
        "bias_ih": torch.float32,
        "bias_hh": torch.float16,
    }
    for certify in (False, True):
        module = spoiled(make(3, 4, 2, stability=Certified(norm=norm)))
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(p.detach().to(kinds[name[:-3]])))
        module.project_(certify=certify)
        assert all(p.dtype == kinds[name[:-3]] for name, p in module.named_parameters())
        assert module.certificate().rate <= (0.99 if certify else 1.2)


@pytest.mark.parametrize("certify", [False, True])
def test_sizes_of_zero(certify):
    cell = StableLSTMCell(3, 0)
    cell.project_(certify=certify)
    with pytest.raises(ValueError, match="no hidden unit"):
        cell.certificate()
    for make in (StableLSTMCell, StableRNNCell, StableGRUCell):
        module = spoiled(make(0, 4))  # biases are all that drives it
        module.project_(certify=certify)
        assert module.certificate().rate <= (0.99 if certify else 1.0)


@pytest.mark.parametrize(
    "name, shape, needed",
    [
        ("weight_hh_l0", (16, 5), (16, 4)),
        ("weight_ih_l1", (16, 3), (16, 8)),
        ("bias_ih_l0_reverse", (4,), (16,)),
        ("weight_hh_l1", (64,), (16, 4)),
        ("bias_hh_l0", (1, 16), (16,)),
    ],
)
def test_other_shapes_than_the_sizes_say(name, shape, needed):
    module = spoiled(StableLSTM(3, 4, 2, bidirectional=True))
    setattr(module, name, nn.Parameter(torch.randn(shape)))
    text = f"{name} of StableLSTM has the shape {shape}, where {needed} is needed"
    refused(module, text.replace("(", r"\(").replace(")", r"\)"))


def test_the_default_device_does_not_matter():
    here, there = spoiled(StableLSTM(3, 4, 2)), StableLSTM(3, 4, 2)
    there.load_state_dict(here.state_dict())
    for certify in (False, True):
        here.project_(certify=certify)
        with torch.device("meta"):
            there.project_(certify=certify)
        assert all(torch.equal(p, q) for p, q in zip(here.parameters(), there.parameters()))
