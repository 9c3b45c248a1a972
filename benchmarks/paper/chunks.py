"""F1 over IOB chunks, as the CoNLL-2000 script `conlleval` counts them."""

from __future__ import annotations

from collections.abc import Iterable


def chunks(labels: list[str]) -> set[tuple[int, int, str]]:
    """(first, last + 1, type) of each chunk of one sentence.

    B- always begins a chunk; I- begins one after O, and where the type changes; a chunk ends before O, B- and another type."""
    found, begin, kind = set(), None, ""
    for t, label in enumerate([*labels, "O"]):
        prefix, _, here = label.partition("-")
        if begin is not None and (prefix != "I" or here != kind):
            found.add((begin, t, kind))
            begin = None
        if prefix != "O" and begin is None:
            begin, kind = t, here
    return found


def f1(pairs: Iterable[tuple[list[str], list[str]]]) -> float:
    """100 * F1 over sentences of (true labels, predicted labels); 0 where no chunk is right."""
    correct = true = predicted = 0
    for labels, guess in pairs:
        a, b = chunks(labels), chunks(guess)
        correct, true, predicted = correct + len(a & b), true + len(a), predicted + len(b)
    return 200 * correct / (true + predicted) if correct else 0.0
