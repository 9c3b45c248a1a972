import lane_loop
import pytest

from stable_rnn import _native


@pytest.fixture(params=lane_loop.instruction_sets())
def isa(request):
    """Each instruction set of this machine in turn."""
    before = _native.lib.cpu_features()["isa"]
    _native.lib.set_isa(request.param)
    yield request.param
    _native.lib.set_isa(before)
