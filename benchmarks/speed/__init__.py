"""Recurrent against windowed: `python -m benchmarks.speed`, see benchmarks/README.md."""
