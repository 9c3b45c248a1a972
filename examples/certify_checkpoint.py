"""What is proven of a checkpoint's recurrent layers? In Python, and by the command: python examples/certify_checkpoint.py [file]"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from stable_rnn import Certified, StableLSTM, certificate

with tempfile.TemporaryDirectory() as folder:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "model.pt")
    if len(sys.argv) == 1:  # none given: one that is stable
        torch.manual_seed(0)
        torch.save({"encoder": StableLSTM(8, 32, stability=Certified(rate=0.9, clamp=True)).state_dict()}, file)
    # No code of the file runs. Exit status 0: all were judged, 3: some were, 2: none.
    code = subprocess.run([sys.executable, "-m", "stable_rnn", "certify", file]).returncode

proof = certificate(StableLSTM(8, 32, stability=Certified(rate=0.9)))
for error in (1e-2, 1e-4, 1e-6):
    print(f"within {error:g} of the whole past: the last {proof.window(error)} inputs")
sys.exit(code)
