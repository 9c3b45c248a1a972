"""doctor and certify: what they print, and one clear line for what cannot be done."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stable_rnn
from stable_rnn import StableLSTM, StableRNN, _native
from stable_rnn.cli import main
from stable_rnn.stability import certificate_from_state_dict


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # nothing is cut or wrapped


def refused(capsys, *argv):
    """The one line of a call that ends with exit code 2."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as exit:  # argparse
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def save(path, value):
    torch.save(value, path)
    return path


def test_doctor_tells_every_backend_and_why(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for backend in stable_rnn.backends():
        assert backend.name in out and backend.reason in out
    for fact in (stable_rnn.__version__, torch.__version__, f"{torch.get_num_threads()} of {os.cpu_count()} cores", "cuda"):
        assert fact in out
    assert (_native.reason or "loaded") in out


def test_doctor_explains_every_backend(capsys):
    assert main(["doctor"]) == 0
    short = capsys.readouterr().out
    assert main(["doctor", "--explain"]) == 0
    out = capsys.readouterr().out
    assert len(out) > len(short) and "STABLE_RNN_BACKEND" in out and "make build" in out


def test_doctor_without_the_binary():
    run = subprocess.run([sys.executable, "-m", "stable_rnn.cli", "doctor"], text=True, capture_output=True,
                         env=os.environ | {"STABLE_RNN_NATIVE": "off"}, cwd=Path(stable_rnn.__file__).parent.parent)
    assert run.returncode == 0 and "switched off by STABLE_RNN_NATIVE=off" in run.stdout


def test_certify_prints_each_layer_of_a_tree(capsys, tmp_path):
    tree = nn.ModuleDict({"encoder": StableRNN(3, 8), "decoder": StableLSTM(8, 8), "head": nn.Linear(8, 2)})
    assert main(["certify", str(save(tmp_path / "tree.pt", tree.state_dict()))]) == 0
    out = capsys.readouterr().out
    assert "head" not in out
    for name, certificate in certificate_from_state_dict(tree.state_dict()).items():
        assert name in out and str(certificate) in out


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s},
                                  lambda s: {"run": {"ema": s}, "optimizer": {"state": {0: {"step": 1}}}}])
def test_certify_finds_nested_state_dicts(capsys, tmp_path, wrap):
    assert main(["certify", str(save(tmp_path / "nested.pt", wrap(nn.LSTM(2, 4).state_dict())))]) == 0
    assert capsys.readouterr().out


def test_certify_input_bound_matters(capsys, tmp_path):
    path = str(save(tmp_path / "lstm.pt", StableLSTM(2, 4).state_dict()))
    main(["certify", path])
    one = capsys.readouterr().out
    main(["certify", path, "--input-bound", "100"])
    assert capsys.readouterr().out != one


def test_certify_refuses_with_one_line(capsys, tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("hello, I am no checkpoint\n")
    cut = save(tmp_path / "cut.pt", nn.LSTM(2, 64).state_dict())
    cut.write_bytes(cut.read_bytes()[:1000])
    (tmp_path / "empty.pt").touch()
    assert "missing.pt: no such file" in refused(capsys, "certify", tmp_path / "missing.pt")
    assert "is a directory" in refused(capsys, "certify", tmp_path)
    for damaged in (text, cut, tmp_path / "empty.pt"):
        assert "not a PyTorch checkpoint" in refused(capsys, "certify", damaged)
    assert "model.state_dict()" in refused(capsys, "certify", save(tmp_path / "pickled.pt", nn.LSTM(2, 4)))
    for nothing in (nn.Linear(2, 2).state_dict(), torch.zeros(3), {"epoch": 1}):
        assert "no recurrent layer found" in refused(capsys, "certify", save(tmp_path / "nothing.pt", nothing))


def test_certify_refuses_weights_that_are_no_numbers(capsys, tmp_path):
    state = nn.LSTM(2, 4).state_dict()
    state["weight_hh_l0"][0, 0] = float("nan")
    assert "weight_hh_l0" in refused(capsys, "certify", save(tmp_path / "nan.pt", state))
    del state["weight_ih_l0"]
    refused(capsys, "certify", save(tmp_path / "part.pt", state))


def test_arguments_are_refused_with_one_line(capsys):
    assert "COMMAND" in refused(capsys)
    assert "nonsense" in refused(capsys, "nonsense")
    assert "CHECKPOINT" in refused(capsys, "certify")
    for bound in ("-1", "0", "nan", "inf"):
        assert "must be above 0" in refused(capsys, "certify", "x.pt", "--input-bound", bound)
    assert "invalid float value: 'wide'" in refused(capsys, "certify", "x.pt", "--input-bound", "wide")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and stable_rnn.__version__ in capsys.readouterr().out
