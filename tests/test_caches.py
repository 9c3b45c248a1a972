"""What the package remembers between calls: none of it grows with the sizes that calls bring, or with their number."""

import inspect
from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch

import stable_rnn
from stable_rnn.ops import cuda_device
from stable_rnn.ops.recurrence import cuda
from stable_rnn.ops.spectral import triton as spectral

OPTIONAL = ("triton", "matplotlib")  # packages that some modules need


def caches():
    """(where, function) of every functools cache in the package."""
    for found in walk_packages(stable_rnn.__path__, "stable_rnn."):
        try:
            module = import_module(found.name)
        except ModuleNotFoundError as error:
            assert error.name in OPTIONAL, error
            continue
        yield from (
            (f"{found.name}.{name}", value)
            for name, value in vars(module).items()
            if hasattr(value, "cache_parameters") and value.__module__ == found.name
        )


def test_a_cache_without_a_limit_knows_devices_at_most():
    found = dict(caches())
    assert {"stable_rnn.ops.recurrence.cuda._tiling", "stable_rnn.ops.cuda_device.limits"} <= found.keys()
    for where, function in found.items():
        if function.cache_parameters()["maxsize"] is None:
            assert list(inspect.signature(function).parameters) in ([], ["index"]), where


def test_tilings_of_all_lengths_are_not_kept(monkeypatch):
    class Lib:
        asked = []

        def recurrence_tiling_cuda(self, *shape):
            self.asked.append(shape)
            return {"message": None, "workspace_bytes": 0}

    monkeypatch.setattr(cuda_device, "lib", Lib())
    cuda._tiling.cache_clear()
    for length in range(1, 2000):
        cuda.tiling((90, 132, 232448, 16), False, "lstm", 0, 256, length)
        cuda.tiling((90, 132, 232448, 16), True, "lstm", 0, 256, 1)
    assert len(Lib.asked) == 2000  # a tiling in use is kept
    assert cuda._tiling.cache_info().currsize <= 256
    cuda._tiling.cache_clear()


@pytest.fixture
def capture(monkeypatch):
    """capture(values) as while a CUDA graph is captured, of a table that an earlier step has made."""
    monkeypatch.setattr(spectral, "_captured", {})
    spectral._constant.cache_clear()

    def run(values):
        monkeypatch.setattr(spectral, "_capturing", lambda device: False)
        spectral._kept(values, torch.int64, torch.device("cpu"))
        monkeypatch.setattr(spectral, "_capturing", lambda device: True)
        return spectral._kept(values, torch.int64, torch.device("cpu"))

    yield run
    spectral._constant.cache_clear()


def test_a_step_captured_again_keeps_no_other_table(capture):
    first = capture([1, 2, 3])
    for other in range(100):  # more than the tables of eager steps that are kept
        capture([other, other])
        assert capture([1, 2, 3]) is first
    assert len(spectral._captured) == 101
    assert first.tolist() == [1, 2, 3]
