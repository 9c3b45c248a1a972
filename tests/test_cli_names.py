"""Names, files and arguments that hold control characters are only shown, and cut where they are long."""

import contextlib
import math

import pytest
import torch
from test_cli import refused, save, two_gates, wide  # noqa: F401  `wide` acts on every test
from torch import nn

from stable_rnn import _native
from stable_rnn.cli import main
from stable_rnn.stability import certificate_from_state_dict


def only_shown(text):
    """Whether a terminal shows the text and does nothing else."""
    return all(line.isprintable() for line in text.split("\n"))


EVIL = "a\x1b]0;owned\x07\x1b[31mb\r\nc\x7f\x9b\u202e\u2066\u2028\udc80d"  # colours, title, new lines, C1, direction of writing, no UTF-8


SHOWN = r"a\x1b]0;owned\x07\x1b[31mb\r\nc\x7f\x9b\u202e\u2066\u2028\udc80d"


def evil(state):
    return {f"{EVIL}.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "make, code",
    [
        (lambda: evil(nn.LSTM(2, 4).state_dict()), 0),
        (lambda: {EVIL: nn.LSTM(2, 4).state_dict()}, 0),
        (lambda: evil(two_gates()), 2),
        (lambda: evil({key: value.long() for key, value in nn.RNN(2, 4).state_dict().items()}), 2),
        (lambda: evil({key: value * math.nan for key, value in nn.RNN(2, 4).state_dict().items()}), 2),
        (lambda: evil(nn.RNN(2, 4).state_dict() | {"bias_hh_l0": torch.zeros(3)}), 2),
        (
            lambda: evil(
                {
                    "weight_hh_l0_g": torch.zeros(4),
                    "weight_hh_l0_v": torch.zeros(4, 4),
                    "weight_ih_l0": torch.zeros(4, 2),
                }
            ),
            2,
        ),
    ],
)
def test_names_in_a_checkpoint_are_only_shown(capsys, tmp_path, make, code):
    state = make()
    assert main(["certify", str(save(tmp_path / "names.pt", state))]) == code
    out, err = capsys.readouterr()
    assert only_shown(out) and only_shown(err) and SHOWN in (err if code else out)
    if not isinstance(state.get(EVIL), dict):
        with pytest.warns() if "GRU" in err or "computed" in err else contextlib.nullcontext() as said:
            try:
                certificate_from_state_dict(state)
            except (TypeError, ValueError) as error:
                assert only_shown(str(error))
        assert said is None or only_shown(str(said[0].message))


@pytest.mark.parametrize(
    "argv",
    [
        [EVIL],
        ["certify", EVIL],
        ["certify", "x", EVIL],
        ["certify", "x", "--input-bound", EVIL],
        ["doctor", f"--{EVIL}"],
        ["doctor", "--shape", EVIL],
        ["demo", "--steps", EVIL],
        ["demo", "--seed", EVIL],
        ["demo", "--text", EVIL],
        ["demo", "--data", EVIL],
        ["demo", "--plan", EVIL],
        ["demo", "--out", f"/dev/null/{EVIL}"],
    ],
)
def test_arguments_are_only_shown(capsys, argv):
    line = refused(capsys, *argv)
    assert only_shown(line) and SHOWN[:12] in line and len(line) < 1000


def test_files_names_and_variables_are_only_shown(capsys, tmp_path, monkeypatch):
    path = tmp_path / EVIL
    path.write_text("no checkpoint")
    assert SHOWN in refused(capsys, "certify", path) and SHOWN in refused(capsys, "demo", "--text", path)
    assert SHOWN in refused(
        capsys, "certify", path.rename(tmp_path / f"{EVIL}.pt").parent
    )  # lists what is in the folder
    monkeypatch.setenv("STABLE_RNN_BACKEND", EVIL)
    monkeypatch.setattr(_native, "lib", None)
    monkeypatch.setattr(_native, "reason", f"does not load: {EVIL}[/red]")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert only_shown(out) and out.count(SHOWN) == 4 and out.count(f"{SHOWN}[/red]") == 3


def test_long_names_are_cut_and_others_are_whole(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for size, most in ((190, 3000), (10**6, 3000)):
        for state in (nn.LSTM(2, 4).state_dict(), two_gates()):
            name = "x" + "y" * (size - 2) + "z"
            main(["certify", str(save(tmp_path / "long.pt", {f"{name}.{key}": value for key, value in state.items()}))])
            said = "".join(capsys.readouterr())
            assert len(said) < most and (
                (name in said) if size < 200 else ("xyyy" in said and "y[...]y" in said and "yyyz" in said)
            )
