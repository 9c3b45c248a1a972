"""`stable-rnn certify` on files of every kind: what is read, what is said of the rest. No code of a file is run."""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import socket
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from stable_rnn import Certified, StableLSTM
from stable_rnn.cli import main
from stable_rnn.stability import certificate_from_state_dict


@pytest.fixture
def certify(capsys, tmp_path):
    """Exit code, stdout and stderr for a file, or for what torch.save makes of a value."""

    def run(what, **how):
        if not isinstance(what, (str, pathlib.Path)):
            torch.save(what, tmp_path / "made.pt", **how)
            what = tmp_path / "made.pt"
        return main(["certify", str(what)]), *capsys.readouterr()

    return run


def lstm(prefix=""):
    return {prefix + key: value for key, value in nn.LSTM(2, 4).state_dict().items()}


def refused(found):
    code, out, err = found
    assert code == 2 and out == "" and err.count("\n") == 1, found
    return err


@dataclasses.dataclass
class Config:
    size: int = 3


class AttributeDict(dict):
    pass


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.1, path=pathlib.Path("/data")),
        pathlib.PureWindowsPath("C:/data"),
        np.float64(0.1),
        np.zeros(3),
        Config(),
        collections.defaultdict(list, {"a": [1]}),
        AttributeDict(size=3),
        collections.Counter("ab"),
        complex(1, 2),
        {1, 2},
        b"bytes",
        torch.float16,
        torch.device("cpu"),
        slice(3),
        len,
    ],
)
def test_objects_beside_the_weights_are_passed_over(certify, beside, old):
    state = {"state_dict": lstm("enc."), "hyper_parameters": beside}
    code, out, err = certify(state, _use_new_zipfile_serialization=not old)
    assert code == 0 and out.startswith("--- state_dict.enc ---\n") and err == ""


def test_a_module_beside_the_weights(certify):
    assert certify({"a": lstm(), "b": nn.Linear(2, 2)})[0] == 0
    line = refused(
        certify({"a": lstm(), "b": nn.Linear(2, 2)}, _use_new_zipfile_serialization=False)
    )  # with its source, before torch 1.6
    assert "write model.state_dict() with torch.save" in line


def test_weights_in_a_dict_of_another_class_are_found(certify):
    assert certify(AttributeDict(lstm()))[0] == certify(collections.defaultdict(list, lstm()))[0] == 0


def test_no_code_of_a_file_is_run(certify, tmp_path):
    for value in (Runs(tmp_path / "ran"), {"a": lstm(), "b": Runs(tmp_path / "ran")}):
        for old in (False, True):
            certify(value, _use_new_zipfile_serialization=not old)
    assert not (tmp_path / "ran").exists()
    blocked = type("System", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "ran"),))})()
    assert "(posix.mkdir), which are not loaded since they can run code" in refused(
        certify({"a": lstm(), "b": blocked})
    )
    assert not (tmp_path / "ran").exists()


def test_weights_in_objects_are_not_read_and_it_is_said(certify):
    line = refused(certify({"model": nn.LSTM(2, 4), "options": Config()}))
    assert (
        "torch.nn.modules.rnn.LSTM" in line
        and "Config" in line
        and "save model.state_dict() instead of the model" in line
    )
    line = refused(certify({key: value.numpy() for key, value in lstm().items()}))
    assert "holds NumPy arrays" in line and "torch.from_numpy" in line
    assert "Unsupported operand" in refused(certify(lstm(), pickle_protocol=4))


@pytest.mark.parametrize("old", [False, True])
def test_a_file_cut_anywhere_is_called_cut(certify, tmp_path, old):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    torch.save(lstm(), whole, _use_new_zipfile_serialization=not old)
    data = whole.read_bytes()
    for end in (20, 200, len(data) // 3, len(data) // 2, len(data) - 50, len(data) - 1):
        part.write_bytes(data[:end])
        assert "part.pt: is damaged or cut short" in refused(certify(part)), end


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: w.fill_(float("nan")), "holds NaN or infinite values"),
        (lambda w: w.fill_(float("inf")), "holds NaN or infinite values"),
        (lambda w: w.long(), "must have a real floating dtype"),
        (lambda w: w.to_sparse(), "must be a dense tensor"),
        (lambda w: w.to("meta"), "is on the meta device"),
        (lambda w: w.T, "which doesn't fit"),
    ],
)
def test_one_bad_layer_hides_no_other(certify, change, reason):
    state = {"enc": lstm(), "run": {**lstm("bad."), **lstm("good.")}, "tail": lstm()}
    state["run"]["bad.weight_ih_l0"] = change(state["run"]["bad.weight_ih_l0"])
    code, out, err = certify(state)
    assert code == 3 and [line for line in out.splitlines() if "---" in line] == [
        "--- enc ---",
        "--- run.good ---",
        "--- tail ---",
    ]
    assert err.startswith("stable-rnn certify: run.bad.weight_ih_l0 ") and reason in err and err.count("\n") == 1


def test_a_layer_that_looks_too_large_for_any_memory_hides_no_other(certify):
    few = torch.zeros(4)
    for huge in (
        few[:1].expand(2**30, 2**30),
        few.as_strided((2**15, 2**15), (0, 0)),
        few.to("meta").new_zeros(2**20, 2**20),
    ):
        code, out, err = certify({"bad.weight_hh_l0": huge, "bad.weight_ih_l0": huge, **lstm("good.")})
        assert code == 3 and "--- good ---" in out and err.count("\n") == 1
        assert (
            "bad.weight_ih_l0 is on the meta device" in err if huge.is_meta else "bad.weight_ih_l0 has the shape" in err
        )


def test_all_layers_bad(certify):
    bad = {key: value * float("nan") for key, value in {**lstm("a."), **lstm("b.")}.items()}
    code, out, err = certify(bad)
    assert (
        code == 2
        and out == ""
        and "a.weight_ih_l0 holds" in err
        and "b.weight_ih_l0 holds" in err
        and err.count("\n") == 3
    )


def test_the_next_step_is_said_where_there_is_no_proof(certify):
    assert "stabilize(model, stability=Certified())" in certify(lstm())[1]
    layer = StableLSTM(2, 4)
    layer.project_()
    code, out, _ = certify({key: value * 0.1 for key, value in layer.state_dict().items()})
    assert code == 0 and "\nstable: rate" in out and "stabilize(" not in out


def test_what_is_no_regular_file(certify, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe, not a regular file" in refused(certify(tmp_path / "pipe"))
    assert "is a device, not a regular file" in refused(certify(os.devnull))
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(os.path.relpath(tmp_path / "s"))
        assert "is a socket, not a regular file" in refused(certify(tmp_path / "s"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for missing in (tmp_path / "gone", "a\0b"):
        assert "no such file" in refused(certify(missing))
    assert "File name too long" in refused(certify("x" * 3000))


def test_a_directory_says_what_lies_in_it(certify, tmp_path):
    torch.save(lstm(), tmp_path / "pytorch_model.bin")
    assert "is a directory; name a file in it: pytorch_model.bin\n" in refused(certify(tmp_path))
    (tmp_path / ".metadata").touch()
    assert "dcp_to_torch_save" in refused(certify(tmp_path))


def test_safetensors_are_told_by_their_content(certify, tmp_path):
    named, other = tmp_path / "m.safetensors", tmp_path / "m.bin"
    state = {**lstm("enc."), "embedding": torch.zeros(3)}
    safetensors.torch.save_file(state, named)
    other.write_bytes(named.read_bytes())
    said = certify(state)
    assert said[0] == 0 and said == certify(named) == certify(other)
    for end in (4, 30, len(named.read_bytes()) - 1):
        named.write_bytes(other.read_bytes()[:end])
        assert "m.safetensors: is damaged or cut short" in refused(certify(named))
    torch.save(state, named)
    assert certify(named) == said


def test_safetensors_without_its_package(certify, tmp_path, monkeypatch):
    safetensors.torch.save_file(lstm(), tmp_path / "m.bin")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install 'stable-rnn[safetensors]'" in refused(certify(tmp_path / "m.bin"))


def test_the_index_of_a_checkpoint_in_parts(certify, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(
        json.dumps({"weight_map": {"enc.weight_hh_l0": "part-2.safetensors", "embedding": "part-1.safetensors"}})
    )
    line = refused(certify(path))
    assert "index of a checkpoint in several files" in line and "part-2.safetensors" in line and "part-1" not in line
    for text in ("{}", '{"weight_map": 3}', "{" * 10**5):
        path.write_text(text)
        assert "not a PyTorch checkpoint" in refused(certify(path))


def test_other_archives(certify, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.save(tmp_path / "a.npy", np.zeros(3))
    for name in ("a.npz", "a.npy"):
        assert "holds NumPy arrays" in refused(certify(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**6))
    assert "is a compressed archive" in refused(certify(tmp_path / "bomb.pt"))
    with zipfile.ZipFile(tmp_path / "letter.docx", "w") as archive:
        archive.writestr("letter.xml", "hello")
    assert "is a zip archive, but not one that torch.save wrote" in refused(certify(tmp_path / "letter.docx"))


def test_a_clamp_is_read_from_the_metadata(certify):
    net = nn.Sequential(StableLSTM(2, 4, stability=Certified(clamp=True)))
    with torch.no_grad():
        net[0].weight_ih_l0.mul_(9)  # with a clamp these do not count
    state = net.state_dict()
    assert not certificate_from_state_dict(dict(state))["0"].stable
    for value, name in ((state, "0"), ({"step": 3, "model": state}, "model.0"), (net[0].state_dict(), "the model")):
        code, out, _ = certify(value)
        assert code == 0 and f"--- {name} ---\nstable: rate 0." in out and ", a forget gate clamped at 0.6, " in out
    for odd in ("x", 0.0, float("nan"), True, [0.5], {}):  # whatever a file holds there
        state._metadata["0"]["forget_clamp"] = odd
        code, out, _ = certify(state)
        assert code == 0 and "NOT certified" in out and ", no clamp of the forget gate, " in out
    state._metadata = {"0": 7}
    assert "no clamp" in certify(state)[1]


def test_files_made_to_be_endless(certify):
    many = [lstm()]
    for _ in range(40):
        many = [many] * 10  # 10**40 ways to the layer
    code, out, _ = certify(many)
    assert code == 0 and out.count("---\n") == 1
    deep = lstm()
    for _ in range(100):
        deep = {"x" * 10**4: deep}
    assert len("".join(certify(deep)[1:])) < 3000
    assert "has the layers 99999999 only" in refused(
        certify({f"{key}{'9' * 5000}": value for key, value in lstm().items()})
    )
