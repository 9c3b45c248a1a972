"""Libraries that ask `isinstance(m, nn.LSTM)`, with their modules swapped. docs/guide/drop-in.md has the same lines."""

import copy
import warnings

import pytest
import torch

from stable_rnn import StableLSTM, stabilize


def mask_to_lengths(module, args, kwargs):
    mask = kwargs.pop("mask", None)  # (B, T), true until a trajectory ends
    return args, kwargs if mask is None else kwargs | {"lengths": mask.sum(1)}


def test_torchrl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = pytest.importorskip("torchrl.modules")
    tensordict = pytest.importorskip("tensordict")
    plain = modules.LSTMModule(
        input_size=5, hidden_size=6, num_layers=2, in_key="observation", out_key="out", recurrent_backend="pad"
    )
    ours = stabilize(copy.deepcopy(plain))
    ours.lstm.register_forward_pre_hook(mask_to_lengths, with_kwargs=True)
    data = tensordict.TensorDict(
        {"observation": torch.randn(3, 20, 5), "is_init": torch.zeros(3, 20, 1, dtype=torch.bool)}, [3, 20]
    )
    data["is_init"][1, 7] = data["is_init"][2, 3] = True
    with modules.set_recurrent_mode(True):
        expected, found = plain(data.clone()), ours(data.clone())
    assert type(ours.lstm) is StableLSTM
    for key in ("out", ("next", "recurrent_state_h"), ("next", "recurrent_state_c")):
        torch.testing.assert_close(found[key], expected[key])


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
