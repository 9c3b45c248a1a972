"""Audio or sensor data, one step at a time, through a cell with the weights of a trained layer: python examples/streaming.py [steps]"""

import sys
import time

import torch

from stable_rnn import StableLSTM, StableLSTMCell

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
torch.manual_seed(0)
torch.set_num_threads(1)  # the steadiest latency
lstm = StableLSTM(16, 64).eval()
cell = StableLSTMCell(16, 64, stability=lstm.stability).eval()
cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in lstm.state_dict().items()})

stream = torch.randn(steps, 1, 16)
outputs, times, state = [], [], None
with torch.inference_mode():
    for x in stream:
        start = time.perf_counter()
        state = cell(x, state)
        times.append(time.perf_counter() - start)
        outputs.append(state[0])
    whole = lstm(stream)[0]

times.sort()
print(f"a step: median {times[len(times) // 2] * 1e6:.0f} us, 99 % below {times[len(times) * 99 // 100] * 1e6:.0f} us")
print(f"against one pass over all steps: {(torch.stack(outputs) - whole).abs().max():.1e}")
print(f"a lost packet is forgotten, to 1e-3, within {lstm.certificate().window(1e-3)} steps: proven for |x| <= 1")
assert torch.allclose(torch.stack(outputs), whole, atol=1e-6)
