"""The paper's experiments in small: loaders, F1, models, measurements, resuming, the budget, the report, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import jsonl
from benchmarks.paper import data, measure, runs
from benchmarks.paper.__main__ import TASKS as NAMES
from benchmarks.paper.__main__ import main
from benchmarks.paper.chunks import chunks, f1
from benchmarks.paper.models import BODIES, CONFIGS, Model, count, fitting_width, parse
from benchmarks.paper.tasks import TASKS, batches, loss, score
from benchmarks.paper.train import Setting, build, refined, searched, train
from stable_rnn import Certified, ForgetCap, Recurrent, Windowed
from stable_rnn._errors import UserError


@pytest.fixture
def root(tmp_path):
    """A data root in the formats of the real one."""
    from scipy.io import savemat

    folder = tmp_path / "data"
    for name in ("poly_music", "atis", "ptb", "wikitext-2"):
        (folder / name).mkdir(parents=True)
    draw = np.random.default_rng(0)

    def cell(lengths):
        made = np.empty((1, len(lengths)), object)
        for i, length in enumerate(lengths):
            made[0, i] = (draw.random((length, 88)) < 0.05).astype(np.uint8)
        return made

    rolls = {"traindata": cell([9, 5, 7, 6]), "validdata": cell([6, 8]), "testdata": cell([40, 37])}
    savemat(folder / "poly_music" / "JSB_Chorales.mat", rolls)
    line = "BOS fly to new york at 838 am EOS\tO O O B-city I-city O B-time I-time O\n"
    (folder / "atis" / "atis.train.iob").write_text(line * 6)
    (folder / "atis" / "atis.test.iob").write_text(line + "BOS fly home EOS\tO O B-place O\n")
    for part in ("train", "valid", "test"):
        (folder / "ptb" / f"{part}.txt").write_text(" the cat <unk> N \n the dog \n" * 40)
        (folder / "wikitext-2" / f"{part}.txt").write_text("the cat\n")
    (folder / "wikitext-2" / "train.txt").unlink()
    return folder


def test_piano_rolls_predict_the_next_frame(root):
    found = data.music("JSB_Chorales")(root)
    assert [len(part) for part in (found.train, found.valid, found.test)] == [4, 2, 2] and found.outputs == 88
    x, y = found.train[0]
    assert x.shape == y.shape == (8, 88) and torch.equal(x[1:], y[:-1]) and x.dtype == torch.float32


def test_utterances(root):
    found = data.atis(root)
    assert len(found.train) == len(found.valid) == 3 and len(found.test) == 2
    words, labels = found.test[0]
    assert [found.labels[i] for i in labels] == "O O O B-city I-city O B-time I-time O".split()
    assert len(set(words.tolist())) == 9 and words.min() > 0  # every word is known, 838 as 000
    assert found.test[1][0].tolist()[2] == 0  # "home" is not
    assert (
        found.labels[-1] == "B-place" and found.outputs == len(found.labels) - 1
    )  # seen in the test part alone: cannot be predicted


def test_texts(root):
    letters, words = data.characters(root), data.penn_words(root)
    x, y = letters.train[0]
    assert torch.equal(x[1:], y[:-1]) and letters.symbols == len(set("the_cat_<unk>_N\nthe_dog\n"))
    assert len(x) == 40 * len("the_cat_<unk>_N\nthe_dog\n") - 1
    assert words.symbols == len({"the", "cat", "<unk>", "N", "dog", "<eos>"}) and len(words.train[0][0]) == 40 * 8 - 1
    assert "checksum" in words.note and data.PTB_MD5 in words.note


@pytest.mark.parametrize("task", NAMES)
def test_what_is_missing_is_named_with_its_home(task, tmp_path, capsys):
    assert main([task, "--data", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "nowhere") in said and "is missing; get it from" in said


def test_wikitext_says_where_its_training_part_is(root, capsys):
    assert main(["wikitext-2", "--data", str(root)]) == 2
    said = capsys.readouterr().err
    assert "wikitext-2/train.txt is missing" in said and data.WIKITEXT_BLOB in said
    (root / "wikitext-2" / "train.txt").write_text("the cat\n" * 9)
    assert data.wikitext(root).symbols == 3 and data.WIKITEXT_BLOB in data.wikitext(root).note


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O B-a I-a O", {(1, 3, "a")}),
        ("B-a B-a", {(0, 1, "a"), (1, 2, "a")}),
        ("I-a I-a O I-b", {(0, 2, "a"), (3, 4, "b")}),  # I- after O begins a chunk
        ("B-a I-b I-b", {(0, 1, "a"), (1, 3, "b")}),  # and so does another type
        ("B-x.y-z I-x.y-z", {(0, 2, "x.y-z")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_chunks(labels, expected):
    assert chunks(labels.split()) == expected


def test_f1_by_hand():
    def pair(true, guess):
        return true.split(), guess.split()

    assert f1([pair("B-a I-a O B-b", "B-a I-a O B-b")]) == 100
    assert f1([pair("B-a I-a O B-b", "B-a O O B-b")]) == 50  # one of two right: the border is wrong
    # 3 true, 4 predicted, 2 right: precision 1/2, recall 2/3
    assert f1([pair("B-a O B-b", "B-a B-c B-c"), pair("B-a", "B-a")]) == pytest.approx(200 * 2 / 7)
    assert f1([pair("B-a O", "O O")]) == 0 and f1([pair("O", "O")]) == 0
    assert f1([pair("B-a I-a", "I-a I-a")]) == 100  # conlleval sees the same chunk


def test_metrics_count_real_steps_only():
    task = TASKS["jsb"]
    logits, y = torch.zeros(3, 2, 88), torch.zeros(3, 2, 88)
    real = torch.tensor([[True, True], [True, False], [True, False]])
    logits[1:, 1] = 100.0  # padding
    assert loss(task, logits, y, real).item() == pytest.approx(88 * math.log(2), rel=1e-6)
    task, symbols = TASKS["ptb-char"], torch.zeros(3, 2, dtype=torch.int64)
    assert score(task, None, [(torch.zeros(3, 2, 16), symbols, real)]) == pytest.approx(4, rel=1e-6)
    assert score(TASKS["ptb-word"], None, [(torch.zeros(3, 2, 16), symbols, real)]) == pytest.approx(16, rel=1e-5)


def test_batches_hold_every_row_once_and_cut_long_ones():
    rows = [(torch.full((n,), n), torch.full((n,), n)) for n in (3, 9, 4, 100, 1)]
    plain = list(batches(rows, 2))
    assert sorted(n for _, _, lengths, _ in plain for n in lengths.tolist()) == [1, 3, 4, 9, 100]
    assert all((x[real] == y[real]).all() and real.sum() == lengths.sum() for x, y, lengths, real in plain)
    cut = list(batches(rows, 2, 10, torch.Generator().manual_seed(0)))
    found = sorted(n for _, _, lengths, _ in cut for n in lengths.tolist())
    assert found[:4] == [1, 3, 4, 9] and found[4:] in ([10] * 9, [10] * 10)


def test_configurations():
    assert [parse(name).name for name in CONFIGS] == CONFIGS
    assert parse("lstm/certified:rate=.95,cap=true").stability == Certified(0.95, clamp=True)
    assert parse("lstm/certified:norm=inf").stability == Certified(norm="inf")
    assert parse("LSTM/ForgetCap:.9").stability == ForgetCap(0.9) and parse("rnn/none").stability is None
    assert len({parse(name).slug for name in CONFIGS}) == len(CONFIGS)


@pytest.mark.parametrize(
    "name", ["qrnn", "lstm/odd", "lstm/certified:rate=2", "rnn/forgetcap:.9", "tcn/certified", "lstm/certified:x", ""]
)
def test_bad_configurations_are_one_line(name, root, capsys):
    assert main(["jsb", "--data", str(root), "--config", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--config" in said and "allowed are" in said


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("context", [2, 7, 16])
def test_feed_forward_models_are_causal_and_see_their_context(name, context):
    torch.manual_seed(0)
    body = BODIES[name](5, 8, context, 0.0).double().eval()
    x = torch.randn(40, 2, 5, dtype=torch.float64, requires_grad=True)
    body(x)[30, 0].sum().backward()
    seen = x.grad[:, 0].abs().sum(1).nonzero().flatten()
    assert seen.max() == 30 and seen.min() == 30 - body.context + 1 and not x.grad[:, 1].any()
    with torch.no_grad():
        assert torch.allclose(body(x)[:23], body(x[:23]), rtol=1e-12, atol=1e-12)  # products of other sizes: rounding


@pytest.mark.parametrize("name", ["jsb", "atis", "ptb-word"])
def test_models_of_a_task_are_of_one_size(name):
    task = TASKS[name]
    inputs, outputs = {"jsb": (88, 88), "atis": (560, 121), "ptb-word": (10_000, 10_000)}[name]
    for config in map(parse, CONFIGS):
        width = fitting_width(config, task, inputs, outputs)
        with torch.device("meta"):
            size = count(Model(config, task, inputs, outputs, width, 0.0))
        assert abs(size / task.parameters - 1) < 0.12, (
            config.name,
            width,
            size,
        )  # half a step of the width of two layers of attention


def test_the_search_is_the_same_for_all_and_stays_inside():
    points = [searched(trial) for trial in range(64)]
    assert len(set(points)) == 64 and all(3e-4 <= rate <= 3e-2 and 0 <= dropout <= 0.6 for rate, dropout in points)


def test_the_search_goes_on_from_the_best_point():
    tried = [(0.003, 0.3, 2.0), (0.001, 0.1, 3.0), (0.01, 0.2, 1.0)]
    assert refined(tried) == (0.03, 0.2)
    assert refined([*tried, (0.03, 0.2, 5.0)]) == (round(math.sqrt(0.01 * 0.003), 6), 0.2)
    assert refined([*tried, (0.03, 0.2, 1.5)]) == (round(math.sqrt(0.01 * 0.03), 6), 0.2)
    assert refined([(0.003, 0.3, 2.0), (0.01, 0.1, math.inf)]) == (0.001, 0.3)
    assert refined([(0.003, 0.3, 2.0)]) == (0.009, 0.3)


@pytest.mark.parametrize("name", ["rnn", "lstm", "lstm/forgetcap:.5"])
def test_steps_and_tangents_are_those_of_the_module(name, root):
    """The step that measures forgetting: its trajectory against the module's, its tangents against autograd's Jacobian."""
    task, found = TASKS["jsb"], data.music("JSB_Chorales")(root)
    config = parse(name)
    model = build(config, task, found, Setting(1e-3, 0.0, 6, 1, None), 0).double().eval()
    body, x = model.body, found.test[0][0][:9, None].double()
    body.backend = "reference"  # the compiled kernels have no float64
    xp = torch.nn.functional.linear(x, body.weight_ih_l0, body.bias_ih_l0 + body.bias_hh_l0)
    parts = 2 if config.body == "lstm" else 1
    state = tuple(0.5 * torch.randn(1, 6, dtype=torch.float64) for _ in range(parts))
    eye = torch.eye(6 * parts, dtype=torch.float64)[None].split(6, -1)

    def module(flat):
        h, *c = flat.view(parts, 1, 1, 6)
        after = body(x[:1], (h, c[0]) if c else h)[1]
        return torch.cat([s.flatten() for s in after]) if c else after.flatten()

    after, tangent = measure.step(body, xp[0], state, eye)
    start = torch.cat(state, -1).flatten()
    assert torch.allclose(torch.cat(after, -1).flatten(), module(start), rtol=1e-12, atol=1e-14)
    columns = []
    for i in range(6 * parts):  # central differences: their error is about 1e-10
        e = 1e-5 * torch.eye(6 * parts, dtype=torch.float64)[i]
        columns.append((module(start + e) - module(start - e)) / 2e-5)
    assert torch.allclose(torch.cat(tangent, -1)[0], torch.stack(columns), rtol=0, atol=1e-8)


def test_measured_forgetting_of_a_known_model(root):
    """A tanh RNN near zero with an orthogonal W times 0.5 forgets by 0.5 a step, in every direction."""
    task, found = TASKS["jsb"], data.music("JSB_Chorales")(root)
    model = build(parse("rnn"), task, found, Setting(1e-3, 0.0, 8, 1, None), 0).eval()
    with torch.no_grad():
        for weight in model.body.parameters():
            weight.mul_(1e-4)
        model.body.weight_hh_l0.copy_(0.5 * torch.linalg.qr(torch.randn(8, 8))[0])
    measured = measure.forgetting(model, found.test)
    # tanh' = 1 - h^2 with |h| < 1e-3, and float32 sums
    assert measured["lyapunov"] == pytest.approx(0.5, rel=1e-5)
    assert all(worst == pytest.approx(0.5, rel=1e-5) for worst in measured["worst"].values()) and set(
        measured["worst"]
    ) >= {"1", "32"}
    sweep = measure.truncation(model, task, found)
    off = [point["largest"] for point in sweep["windows"]]
    assert off[0] > off[2] > off[4] and off[-1] == 0 and sweep["steps"] == 39 + 36  # no row is 256 steps long


def test_training_improves_and_keeps_the_certificate(root):
    task, found = TASKS["jsb"], data.music("JSB_Chorales")(root)
    model = build(parse("lstm/certified:cap=true"), task, found, Setting(1e-2, 0.1, 8, 4, None), 0)
    curve = train(model, task, found, Setting(1e-2, 0.1, 8, 4, None), 0)
    assert len(curve) == 4 and curve[-1] < curve[0] and model.body.certificate().rate <= 0.99
    known = measure.certificates(model, task, found)
    assert known["certified"]["stable"] and known["certified_on_data"]["rate"] <= known["certified"]["rate"] * (
        1 + 1e-9
    )


def test_truncated_training_with_long_windows_is_full_training(root):
    task, found = TASKS["jsb"], data.music("JSB_Chorales")(root)
    ends = []
    for plan in (Recurrent(), Windowed(64), Windowed(1)):
        model = build(parse("rnn"), task, found, Setting(1e-2, 0.3, 8, 2, None), 1)
        train(model, task, found, Setting(1e-2, 0.3, 8, 2, None), 1, plan=plan)
        ends.append(runs.vector(model))
    near, far = (ends[0] - ends[1]).norm(), (ends[0] - ends[2]).norm()
    assert near < 1e-3 * far  # two epochs of Adam on gradients that agree to rounding


def command(root, out, *more):
    return [
        "jsb",
        "--data",
        str(root),
        "--out",
        str(out / "paper" / "jsb"),
        "--trials",
        "1",
        "--refine",
        "1",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--config",
        "lstm",
        "--config",
        "lstm/certified",
        "--config",
        "tcn",
        *more,
    ]


def test_runs_resume_and_are_reported(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        measure,
        "speed",
        lambda models, data, seconds: [
            dict(way=name, context=None, median=1e-3, low=1e-3, high=2e-3, off=None, note="", steps=64, threads=1)
            for name in models
        ],
    )
    monkeypatch.setattr(runs, "DISTANCE_WINDOWS", [1, 2])
    monkeypatch.setitem(TASKS, "jsb", replace(TASKS["jsb"], parameters=4000))
    out, place = tmp_path / "out", tmp_path / "out" / "paper" / "jsb"
    assert main(command(root, out)) == 0
    file = place / "runs.jsonl"
    _, rows = jsonl.read(file)
    names = [row["run"] for row in rows]
    assert len(names) == len(set(names)) == 11 and set(names) == {"lstm.distance", "lstm-certified.distance"} | {
        f"{slug}.{run}" for slug in ("lstm", "lstm-certified", "tcn") for run in ("search-0", "search-1", "seed-1")
    }
    assert jsonl.read(place / "speed.jsonl")[0]["models"] == ["lstm", "lstm/certified", "tcn"]
    final = rows[names.index("lstm-certified.seed-1")]
    assert {
        "task",
        "config",
        "setting",
        "seed",
        "test",
        "valid",
        "commit",
        "torch",
        "seconds",
        "certified",
        "measured",
    } <= set(final)
    assert final["certified"]["stable"] and len(final["truncation"]["windows"]) == 9

    lines = file.read_bytes().splitlines(keepends=True)
    lost = names.index("lstm.search-1")
    kept = [line for number, line in enumerate(lines[:-1]) if number != lost]
    file.write_bytes(b"".join(kept) + lines[-1][:99])  # a run that is missing, and one whose writer was interrupted
    with pytest.warns(UserWarning, match="runs.jsonl, line 10: cut short"):
        assert main(command(root, out)) == 0
    after = file.read_bytes()
    assert after.startswith(b"".join(kept)) and [row["run"] for row in jsonl.read(file)[1]][9:] == [
        "lstm.search-1",
        names[-1],
    ]
    assert main(command(root, out)) == 0 and file.read_bytes() == after
    assert not [file for file in place.iterdir() if file.name.startswith(".")]

    assert main(["report", "--out", str(out)]) == 0
    text = (out / "REPORT.md").read_text()
    for part in (
        "## JSB Chorales",
        "price of stability",
        "lstm/certified",
        "146.7",
        "unverified, from memory",
        "What was not run",
        "ATIS",
    ):
        assert part in text
    assert f"{final['test']:.2f}" in text
    for picture in ("truncation.svg", "distance.svg"):
        assert "lstm/certified" in (place / picture).read_text() and picture in text
    file.write_text("{\n" + file.read_text())
    assert main(["report", "--out", str(out)]) == 2 and "runs.jsonl, line 1: not a row" in capsys.readouterr().err


def test_the_budget_ends_a_run_and_leaves_nothing_half(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(root, out, "--minutes", "1e-9")) == 0
    assert "budget" in capsys.readouterr().out and not list(out.rglob("*.jsonl"))
    with pytest.raises(runs.OutOfTime):
        task, found = TASKS["jsb"], data.music("JSB_Chorales")(root)
        train(
            build(parse("rnn"), task, found, Setting(1e-2, 0, 8, 1, None), 0),
            task,
            found,
            Setting(1e-2, 0, 8, 1, None),
            0,
            deadline=0.0,
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chess"], "invalid choice"),
        (["jsb", "--minutes", "0"], "must be above 0"),
        (["jsb", "--trials", "x"], "invalid int"),
        (["jsb", "--refine", "-1"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    found = capsys.readouterr().err
    assert ended.value.code == 2 and found.count("\n") == 1 and said in found


def test_bad_files_are_one_line(root, tmp_path, capsys):
    (root / "poly_music" / "JSB_Chorales.mat").write_bytes(b"no matlab")
    (root / "atis" / "atis.train.iob").write_text("BOS EOS\tO\n")
    (root / "ptb" / "test.txt").write_bytes(b"\xff\xfe\xff")
    for task, said in (("jsb", "MATLAB"), ("atis", "line 1"), ("ptb-char", "cannot be read")):
        assert main([task, "--data", str(root), "--out", str(tmp_path / "out")]) == 2
        found = capsys.readouterr().err
        assert found.count("\n") == 1 and said in found
    assert main(["report", "--out", str(tmp_path)]) == 2 and "no finished results" in capsys.readouterr().err


def test_the_data_root_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("STABLE_RNN_DATA", str(tmp_path))
    assert data.root(None) == tmp_path and str(data.root("elsewhere")) == "elsewhere"
    monkeypatch.delenv("STABLE_RNN_DATA")
    assert data.root(None).parts[-2:] == ("shared", "data")
    with pytest.raises(UserError, match="is missing"):
        data.present(tmp_path / "x", "home")
