"""The paper's experiments on real data: does stability cost accuracy, does truncation? `python -m benchmarks.paper --help`.

Source: Miller & Hardt, "Stable Recurrent Models", ICLR 2019, arXiv 1805.10369.
"""
