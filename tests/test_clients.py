"""Libraries that ask `isinstance(m, nn.LSTM)`, with their modules swapped; code of docs/guide/resets.md is run from there."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch

from stable_rnn import StableLSTM, stabilize


def of_the_guide(name, **known):
    """What the page about resets defines by this name."""
    page = (Path(__file__).parent.parent / "docs/guide/resets.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"^```py\n(.*?)^```", page, re.M | re.S) if name in code)
    exec(code, known)
    return known[name]


@pytest.mark.check
@pytest.mark.parametrize("kind", ["LSTMModule", "GRUModule"])
def test_torchrl_with_resets(kind):
    """Outputs and gradients of TorchRL's own, and everything else where it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    plain = getattr(modules, kind)(input_size=5, hidden_size=6, num_layers=2, in_key="observation", out_key="out")
    ours = stabilize(copy.deepcopy(plain))
    of_the_guide("run_as_it_lies", torch=torch)(ours)
    data = tensordict.TensorDict(
        {"observation": torch.randn(3, 20, 5), "is_init": torch.zeros(3, 20, 1, dtype=torch.bool)}, [3, 20]
    )
    data["is_init"][0, 0] = data["is_init"][1, 7] = data["is_init"][2, 3] = True
    results = []
    for module in (plain, ours):
        with modules.set_recurrent_mode(True):
            given = data.clone()
            found = module(given)
        assert found is given and torch.equal(given["is_init"], data["is_init"])
        states = [found["next", key][:, -1] for key in found["next"].keys() if key.startswith("recurrent_state")]
        grads = torch.autograd.grad(found["out"].square().sum(), list(module.parameters()))
        step = module(data[:, 7].clone())  # a step of a collector
        results.append([found["out"], *states, *grads, step["out"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    flat = data[1].clone()
    with modules.set_recurrent_mode(True):
        torch.testing.assert_close(ours(flat)["out"], plain(data[1].clone())["out"])


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(num_filters=8, hidden_size=16, codebook_size=16, codebook_dim=16)
    model, x = transformers.EncodecModel(config).eval(), torch.randn(1, 1, 640)
    expected = model.encoder(x)
    torch.testing.assert_close(stabilize(model).encoder(x), expected)
    model.save_pretrained(tmp_path)
    again = stabilize(transformers.EncodecModel.from_pretrained(tmp_path)).eval()
    assert any(isinstance(m, StableLSTM) for m in again.modules())
    torch.testing.assert_close(again.encoder(x), expected)


def test_sb3_contrib():
    sb3 = pytest.importorskip("sb3_contrib")
    model = sb3.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=16, batch_size=8, n_epochs=1, seed=0)
    before = model.policy.lstm_actor.weight_hh_l0
    values = before.detach().clone()
    stabilize(model.policy)
    model.learn(16)
    assert type(model.policy.lstm_actor) is StableLSTM and model.policy.lstm_actor.weight_hh_l0 is before
    assert not torch.equal(before, values)


@pytest.mark.check
def test_sb3_contrib_with_resets():
    """Rollouts in one call: the weights that its steps learn."""
    sb3 = pytest.importorskip("sb3_contrib")
    policies = "MlpLstmPolicy", of_the_guide("WholeRollouts", sb3_contrib=sb3)
    learned = []
    for policy in policies:
        torch.manual_seed(0)
        model = sb3.RecurrentPPO(policy, "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu")
        stabilize(model.policy)
        model.learn(128)
        learned.append(dict(model.policy.named_parameters()))
    for name, w in learned[0].items():
        torch.testing.assert_close(learned[1][name], w, rtol=1e-4, atol=1e-5)
