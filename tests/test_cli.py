"""doctor and certify: what they print, and one clear line for what cannot be done."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from executor import build
from torch import nn

import stable_rnn
from stable_rnn import StableLSTM, StableRNN, _native, doctor
from stable_rnn.cli import main
from stable_rnn.ops import cuda_device
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


def holds_itself(value):
    value["self"] = value
    return value


def test_doctor_tells_every_backend_and_why(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for backend in stable_rnn.backends():
        assert backend.name in out and backend.reason in out
    for fact in (
        stable_rnn.__version__,
        torch.__version__,
        f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda",
    ):
        assert fact in out
    assert (_native.reason or "loaded") in out


def test_doctor_explains_every_backend(capsys):
    assert main(["doctor"]) == 0
    short = capsys.readouterr().out
    assert main(["doctor", "--explain"]) == 0
    out = capsys.readouterr().out
    assert len(out) > len(short) and "STABLE_RNN_BACKEND" in out and "make build" in out


def test_doctor_says_what_verified_begins_with(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--shape", "lstm,256,1", "--shape", "rnn_tanh,256,64"]) == 0
    out = capsys.readouterr().out
    lstm, rnn = out[out.index("What Verified()") :].split("rnn_tanh, 256, 64")
    assert "lanes of" in lstm and "warm-up 32" in lstm and "correction decay" in lstm
    assert "the plain recurrence; lanes would cost" in rnn and "lanes of" not in rnn


@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
def test_doctor_predicts_the_time_of_a_shape(capsys, monkeypatch):
    """With the CUDA kernels built in, and no GPU: an H100's."""
    build.on_cpu_tensors(monkeypatch)
    monkeypatch.setattr(cuda_device, "limits", lambda index: (None, "no driver"))
    shapes = (
        "lstm,256,1,bfloat16",
        "rnn_tanh,64,8192,float32",
        "lstm,1024,512,float16",
        "gru,40000,1,float16",
        "rnn_relu,1,1,float16",
    )
    assert main(["doctor", *(word for shape in shapes for word in ("--shape", shape))]) == 0
    out = capsys.readouterr().out
    out = out[out.index("CUDA kernels on") : out.index("What Verified()")]
    lib = build.module()
    assert "an H100, for there is no GPU here. Times are predicted, not measured: 1.755 GHz" in out
    assert "step_costs.h" in out and lib.step_costs_source in out
    first = next(line for line in out.splitlines() if "lstm, 256, 1, bfloat16" in line)
    clocks = lib.recurrence_tiling_cuda(False, 2, 1, 256, 256, 1, doctor.H100)["clocks"]
    assert "524 k, 2.56 kB" in first  # 2 M G H^2; 4 H of xp and H of y
    assert f"{clocks / 1.755e3:.3g} us; T = 1024: {1.024 * clocks / 1.755e3:.3g} ms" in first
    backward = out.splitlines()[out.splitlines().index(first) + 1]
    assert "524 k, 5.63 kB" in backward  # 22 bytes a unit: dy, four gates and c that were saved, dz
    assert "W from L2 for each tile: 8.39 MB" in out  # 4 H^2 at H = 1024 in 16 bits
    assert out.count("too large") == 2  # says so, without a time
    assert "│ 2, 4 B" in out  # of one unit and one lane


@pytest.mark.parametrize(
    "value, said",
    [(0, "0 n"), (1.5e-10, "0.15 n"), (1e-6, "1 u"), (0.02, "20 m"), (1, "1 "), (34e6, "34 M"), (2e13, "20 T")],
)
def test_doctors_numbers(value, said):
    assert doctor._si(value) == said


def test_doctor_says_that_a_backend_is_none(capsys, monkeypatch):
    monkeypatch.setenv("STABLE_RNN_BACKEND", "[/red]")
    assert main(["doctor"]) == 0
    assert "'[/red]', which is no backend: runs will fail; allowed are auto, cuda" in capsys.readouterr().out


def test_doctor_without_the_binary():
    run = subprocess.run(
        [sys.executable, "-m", "stable_rnn.cli", "doctor"],
        text=True,
        capture_output=True,
        env=os.environ | {"STABLE_RNN_NATIVE": "off"},
        cwd=Path(stable_rnn.__file__).parent.parent,
    )
    assert run.returncode == 0 and "switched off by STABLE_RNN_NATIVE=off" in run.stdout


def test_certify_prints_each_layer_of_a_tree(capsys, tmp_path):
    tree = nn.ModuleDict({"encoder": StableRNN(3, 8), "decoder": StableLSTM(8, 8), "head": nn.Linear(8, 2)})
    assert main(["certify", str(save(tmp_path / "tree.pt", tree.state_dict()))]) == 0
    out = capsys.readouterr().out
    assert "head" not in out
    for name, certificate in certificate_from_state_dict(tree.state_dict()).items():
        assert name in out and str(certificate) in out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s},
        lambda s: {"run": {"ema": s}, "optimizer": {"state": {0: {"step": 1}}}},
        lambda s: {"ema": [0, (s,)]},
        lambda s: holds_itself({"a": s}),
        lambda s: {f"[/red]x.{key}": value for key, value in s.items()},
    ],
)
def test_certify_finds_nested_state_dicts(capsys, tmp_path, wrap):
    assert main(["certify", str(save(tmp_path / "nested.pt", wrap(nn.LSTM(2, 4).state_dict())))]) == 0
    assert capsys.readouterr().out


def test_certify_input_bound_matters(capsys, tmp_path):
    path = str(save(tmp_path / "lstm.pt", StableLSTM(2, 4).state_dict()))
    main(["certify", path])
    one = capsys.readouterr().out
    main(["certify", path, "--input-bound", "100"])
    assert capsys.readouterr().out != one
    for bound, said in (("0", "|inputs| <= 0"), ("inf", "inputs of any size")):
        assert main(["certify", path, "--input-bound", bound]) == 0
        assert f"assumes {said}," in capsys.readouterr().out


def test_certify_refuses_with_one_line(capsys, tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("hello, I am no checkpoint\n")
    cut = save(tmp_path / "cut.pt", nn.LSTM(2, 64).state_dict())
    cut.write_bytes(cut.read_bytes()[:1000])
    (tmp_path / "empty.pt").touch()
    assert "missing.pt: no such file" in refused(capsys, "certify", tmp_path / "missing.pt")
    assert "is a directory" in refused(capsys, "certify", tmp_path)
    assert "not a PyTorch checkpoint" in refused(capsys, "certify", text)
    assert "is damaged or cut short" in refused(capsys, "certify", cut)
    assert "is empty" in refused(capsys, "certify", tmp_path / "empty.pt")
    assert "model.state_dict()" in refused(capsys, "certify", save(tmp_path / "pickled.pt", nn.LSTM(2, 4)))
    for nothing in (nn.Linear(2, 2).state_dict(), torch.zeros(3), {"epoch": 1}):
        assert "no recurrent layer found" in refused(capsys, "certify", save(tmp_path / "nothing.pt", nothing))


def test_certify_tells_what_a_file_is_instead(capsys, tmp_path, recwarn):
    state, path = nn.LSTM(2, 4).state_dict(), tmp_path / "other.pt"
    arrays = {key: value.numpy() for key, value in state.items()}
    for protocol in (2, 4):
        for value, text in (
            ({"a": 1}, "holds no tensors"),
            (arrays, "holds NumPy arrays"),
            (state, "write them with torch.save"),
            (nn.LSTM(2, 4), "save model.state_dict() instead of the model"),
        ):
            path.write_bytes(pickle.dumps(value, protocol))
            assert text in refused(capsys, "certify", path)
    assert "holds NumPy arrays" in refused(capsys, "certify", save(path, arrays))
    torch.save(state, path, _use_new_zipfile_serialization=False)
    for end in (60, 600):
        (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:end])
        assert "is damaged or cut short" in refused(capsys, "certify", tmp_path / "cut.pt")
    torch.jit.script(nn.LSTM(2, 4)).save(path)
    assert "is a TorchScript archive" in refused(capsys, "certify", path)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda w: w.to(torch.complex64), "real floating dtype, got torch.complex64"),
        (lambda w: w.long(), "got torch.int64"),
        (lambda w: w.to_sparse(), "must be a dense tensor"),
    ],
)
def test_certify_refuses_other_tensors(capsys, tmp_path, change, text):
    state = {key: change(value) if "weight" in key else value for key, value in nn.RNN(2, 4).state_dict().items()}
    assert text in refused(capsys, "certify", save(tmp_path / "other.pt", state))


@pytest.mark.parametrize("where, text", [("/dev/full", "No space left"), ("&-", "closed")])
def test_output_that_cannot_be_written(tmp_path, where, text):
    path = save(tmp_path / "lstm.pt", nn.LSTM(2, 4).state_dict())
    run = subprocess.run(
        ["sh", "-c", f'"$0" -m stable_rnn.cli certify "$1" >{where}', sys.executable, str(path)],
        text=True,
        stderr=subprocess.PIPE,
        cwd=Path(stable_rnn.__file__).parent.parent,
    )
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and f"standard output: {text}" in run.stderr


def test_certify_refuses_weights_that_are_no_numbers(capsys, tmp_path):
    state = nn.LSTM(2, 4).state_dict()
    state["weight_hh_l0"][0, 0] = float("nan")
    assert "weight_hh_l0" in refused(capsys, "certify", save(tmp_path / "nan.pt", state))
    del state["weight_ih_l0"]
    refused(capsys, "certify", save(tmp_path / "part.pt", state))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("bias_ih_l0", (15,)),
        ("bias_hh_l0", (4, 4)),
        ("weight_ih_l0", (12, 2)),
        ("weight_ih_l0", (32,)),
        ("weight_hh_l0", (16,)),
        ("weight_hr_l0", (4, 4)),
        ("weight_hr_l0", (4,)),
    ],
)
def test_certify_refuses_shapes_that_contradict(capsys, tmp_path, name, shape):
    state = nn.LSTM(2, 4, proj_size=3 if "hr" in name else 0).state_dict()
    state[name] = torch.zeros(shape)
    line = refused(
        capsys, "certify", save(tmp_path / "shapes.pt", {f"enc.{key}": value for key, value in state.items()})
    )
    assert f"enc.{name} has the shape {shape}" in line


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def two_gates():
    """Of no cell that there is."""
    return {"weight_ih_l0": torch.zeros(8, 2), "weight_hh_l0": torch.zeros(8, 4)}


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda: nn.utils.weight_norm(nn.LSTM(2, 4), "weight_hh_l0").state_dict(),
            "has no weight_hh_l0, only enc.weight_hh_l0_g, enc.weight_hh_l0_v (a computed weight",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(2, 4), "weight_hh_l0").state_dict(),
            "has no weight_hh_l0, only enc.parametrizations.weight_hh_l0.original0",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.RNNCell(2, 4), "weight_ih").state_dict(),
            "has no weight_ih, only enc.parametrizations",
        ),
        (
            lambda: without(nn.LSTM(2, 4, 2, bidirectional=True).state_dict(), "weight_ih_l1"),
            "has no weight_ih_l1; skipped",
        ),
        (
            lambda: {key: value for key, value in nn.LSTM(2, 4, 3).state_dict().items() if "_l1" not in key},
            "has the layers 0, 2 only",
        ),
        (
            lambda: nn.LSTM(2, 4, 2).state_dict() | {"weight_ih_l1": torch.zeros(16, 5)},
            "inputs of size 5, the layer below gives 4",
        ),
        (lambda: nn.LSTM(2, 4, 2).state_dict() | nn.RNN(2, 4).state_dict(), "layers of several kinds (lstm, rnn_tanh)"),
        (two_gates, "(8, 4), of no RNN, LSTM or GRU"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_certify_says_what_it_skips_and_why(capsys, tmp_path, make, reason):
    state = {f"enc.{key}": value for key, value in make().items()}
    line = refused(capsys, "certify", save(tmp_path / "alone.pt", state))
    assert "alone.pt: no recurrent layer with a certificate: enc " in line and reason in line
    state |= {f"dec.{key}": value for key, value in nn.LSTM(2, 4).state_dict().items()}
    assert main(["certify", str(save(tmp_path / "both.pt", state))]) == 3
    out, err = capsys.readouterr()
    assert "--- dec ---" in out and "--- enc" not in out and reason in err
    assert err.startswith("stable-rnn certify: enc ") and err.count("\n") == 1


def test_certify_of_zero_weights(capsys, tmp_path):
    for name, module in (("lstm.pt", nn.LSTM(2, 4)), ("rnn.pt", nn.RNN(2, 4, 2)), ("gru.pt", nn.GRU(2, 4))):
        state = {key: torch.zeros_like(value) for key, value in module.state_dict().items()}
        assert main(["certify", str(save(tmp_path / name, state))]) == 0
        out = capsys.readouterr().out
        assert "|h| <= 0" in out and "<= -0" not in out


def test_arguments_are_refused_with_one_line(capsys):
    assert "COMMAND" in refused(capsys)
    assert "nonsense" in refused(capsys, "nonsense")
    assert "CHECKPOINT" in refused(capsys, "certify")
    for bound in ("-1", "nan", "-inf"):
        assert f"must be 0 or more, or inf; got {bound}" in refused(capsys, "certify", "x.pt", f"--input-bound={bound}")
    for seed in ("99999999999999999999999", str(-(2**70))):
        assert "--seed: must lie between -2**63 and 2**64 - 1" in refused(capsys, "demo", f"--seed={seed}")
    for count in ("0", "-3", str(10**30)):
        assert "--threads: must be above 0 and below 2**31" in refused(capsys, "demo", f"--threads={count}")
    assert "invalid float value: 'wide'" in refused(capsys, "certify", "x.pt", "--input-bound", "wide")


def python(*arguments, **more):
    return subprocess.run(
        [sys.executable, *arguments],
        text=True,
        capture_output=True,
        cwd=Path(stable_rnn.__file__).parent.parent,
        **more,
    )


def test_arguments_are_looked_at_before_torch_is_imported():
    """And the package is whole as soon as anything else is asked of it."""
    run = python(
        "-c",
        """
import contextlib, io, sys
from stable_rnn.cli import main
for argv in (["--version"], ["--help"], ["certify", "--help"], ["certify"], ["demo", "--steps", "x"], ["nonsense"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main(argv)
import stable_rnn
assert not hasattr(stable_rnn, "__wrapped__") and stable_rnn.__version__
assert "torch" not in sys.modules, "torch was imported"
from stable_rnn import StableLSTM, plans
from stable_rnn import *
import torch, pickle
assert set(stable_rnn.__all__) <= set(dir(stable_rnn)) and StableLSTM is stable_rnn.StableLSTM and plans.Chunked is Chunked
assert torch.ops.stable_rnn.recurrence and pickle.loads(pickle.dumps(Chunked(3, 1))) == Chunked(3, 1)
assert not hasattr(stable_rnn, "nonsense")
print("whole")
""",
    )
    assert run.stdout == "whole\n", run.stderr
    for module in ("stable_rnn", "stable_rnn.cli"):
        run = python("-X", "importtime", "-m", module, "--version")
        assert run.stdout == f"stable-rnn {stable_rnn.__version__}\n" and "| torch" not in run.stderr.replace(
            "| torch.", ""
        )


def test_a_plain_import_registers_the_ops():
    run = python("-c", "import stable_rnn, torch; print(torch.ops.stable_rnn.recurrence)")
    assert run.stdout == "stable_rnn.recurrence\n", run.stderr


@pytest.mark.parametrize(
    "torch, code, text",
    [
        (  # arrives in here; a job in the background begins with SIGINT ignored
            "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
            130,
            "",
        ),
        (
            "raise OSError('libcudart.so: cannot open shared object file')",
            1,
            "stable-rnn doctor: cannot be loaded here: libcudart.so: cannot",
        ),
        (
            "import a_module_that_is_missing",
            1,
            "stable-rnn doctor: cannot be loaded here: No module named 'a_module_that_is_missing'\n",
        ),
    ],
)
def test_what_happens_while_torch_is_imported(tmp_path, torch, code, text):
    (tmp_path / "torch.py").write_text(torch)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = python("-m", "stable_rnn", "doctor", env=os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"})
    if run.returncode == 1 and "No module named stable_rnn" in run.stderr:
        raise AssertionError(run.stderr)
    assert run.returncode == code and run.stderr.startswith(text) and run.stderr.count("\n") == bool(text), run.stderr


@pytest.mark.parametrize("argv", [["doctor"], ["--help"]])
def test_a_reader_that_has_read_enough(monkeypatch, capfd, argv):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        try:
            code = main(argv)
        except SystemExit as exit:  # rich's way
            code = exit.code
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    assert code == 1 and capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["doctor", "certify", "demo"])
def test_help_has_an_example_and_the_exit_codes(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"example:\n  stable-rnn {command} " in out and "exit codes:\n  0    " in out and "  130  interrupted" in out
    assert ("  3    " in out) == (command == "certify")


def test_a_terminal_without_the_letters_of_a_name(tmp_path, monkeypatch):
    path = save(tmp_path / "lstm.pt", {f"enc\u00e9.{key}": value for key, value in nn.LSTM(2, 4).state_dict().items()})
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["certify", str(path)]) == 0
        monkeypatch.undo()
        assert rb"--- enc\xe9 ---" in screen.buffer.getvalue()


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and stable_rnn.__version__ in capsys.readouterr().out
