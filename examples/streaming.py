"""Audio or sensor data as it comes, one step at a time, of many streams that come and go: python examples/streaming.py [steps]"""

import io
import sys
import time

import torch

from stable_rnn import StableLSTM

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
torch.manual_seed(0)
torch.set_num_threads(1)  # the steadiest latency
lstm = StableLSTM(16, 64).eval()

x = torch.randn(steps, 1, 16)
outputs, times, stream = [], [], lstm.stream()
with torch.inference_mode():
    for step in x.split(1):
        start = time.perf_counter()
        outputs.append(stream.push(step))
        times.append(time.perf_counter() - start)
    whole = lstm(x)[0]

times.sort()
print(f"a step: median {times[len(times) // 2] * 1e6:.0f} us, 99 % below {times[len(times) * 99 // 100] * 1e6:.0f} us")
print(f"against one pass over all steps: {(torch.cat(outputs) - whole).abs().max():.1e}")
print(f"a lost packet is forgotten, to 1e-3, within {lstm.certificate().window(1e-3)} steps: proven for |x| <= 1")
assert torch.allclose(torch.cat(outputs), whole, atol=1e-6)

# A server of 8 callers: two speak, one hangs up, and the next one takes its place; then it moves to another process.
calls, file = lstm.stream(batch_size=8), io.BytesIO()
with torch.inference_mode():
    calls.push(torch.randn(3, 2, 16), slots=[0, 5])
    calls.reset([5])
    calls.push(x[:10], slots=[5])
    torch.save(calls.state, file)
    file.seek(0)
    moved = lstm.stream(state=torch.load(file, weights_only=True))
    assert torch.allclose(moved.push(x[10:20], slots=[5]), whole[10:20], atol=1e-6)
