"""`stable-rnn certify`: certificates of the recurrent layers in a checkpoint, without running any code of it."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from rich.console import Console
from torch import Tensor

from . import checkpoint
from ._errors import UserError, complain, printable
from .stability.certificate import Certificate, judge_state_dict

SOME = 3  # exit code: some layers were judged, others not
DEEP = 10_000  # characters of the keys that lead to a layer; only a file made to be deep has more
NEXT = """
NOT certified: such a layer may forget, but it is not proven. What to do next:
  a proof      model = stabilize(model, stability=Certified()); project_() on its layers, project_after_step(optimizer, model) in training
               stability=Cascade() instead, for models to be trained anew: less accuracy lost, a shorter window
  no proof     stability=ForgetCap(0.9) clamps the gates by which an LSTM or GRU forgets: train on with it, it forgets in practice
  no change    plan=Verified() cuts long sequences and checks every border, whatever the weights are"""


def certify(options: argparse.Namespace) -> int:
    """Print the certificate of each recurrent layer in the file; `UserError` when there is none to be had."""
    path, console = printable(options.checkpoint), Console(highlight=False)
    found: list[Certificate] = []
    faults: list[str] = []
    value, passed_over = checkpoint.load(options.checkpoint)
    for state_dict in state_dicts(value):
        certificates, why_not = judge_state_dict(state_dict, options.input_bound)
        faults += map(str, why_not.values())
        for name, certificate in certificates.items():
            found.append(certificate)
            console.print(f"--- {printable(name) or 'the model'} ---", style="bold", soft_wrap=True, markup=False)
            console.print(str(certificate), soft_wrap=True, markup=False)
    if not found and not faults:
        raise UserError(f"{path}: {checkpoint.nothing_found(passed_over)}")
    if not found and len(faults) == 1:
        raise UserError(f"{path}: no recurrent layer with a certificate: {faults[0]}; skipped")
    if not all(certificate.stable for certificate in found):
        console.print(NEXT, soft_wrap=True, markup=False)
    for reason in faults:
        complain("stable-rnn certify", f"{reason}; skipped")
    if not found:
        raise UserError(f"{path}: no recurrent layer with a certificate, {len(faults)} without: see above")
    return SOME if faults else 0


def state_dicts(value: object) -> Iterator[dict[str, Tensor]]:
    """The tensors of every mapping that holds recurrent weights, inside of nested mappings, lists and tuples, by the keys that lead to
    them, with torch's metadata. What lies in several places is found in the first."""
    waiting, seen = [("", value)], set()
    while waiting:
        start, value = waiting.pop()
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in seen or len(start) > DEEP:
            continue
        seen.add(id(value))
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        tensors = {key: item for key, item in items if isinstance(key, str) and isinstance(item, Tensor)}
        if any("weight_hh" in key for key in tensors):
            found = OrderedDict((f"{start}{key}", item) for key, item in tensors.items())
            of_modules = getattr(value, "_metadata", None)
            if isinstance(of_modules, Mapping):
                found._metadata = {f"{start}{key}".removesuffix("."): item for key, item in of_modules.items()}  # type: ignore[attr-defined]
            yield found
        waiting += [(f"{start}{_short(key)}.", item) for key, item in reversed(items)]


def _short(key: object) -> str:
    """A key of any kind, as part of a name."""
    text = (
        key
        if isinstance(key, str)
        else repr(key)
        if isinstance(key, (int, float)) and abs(key) < 2**63
        else type(key).__name__
    )
    return text if len(text) <= 1000 else printable(text)
