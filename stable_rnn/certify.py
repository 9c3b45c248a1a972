"""`stable-rnn certify`: certificates of the recurrent layers in a checkpoint, without running any code of it."""

from __future__ import annotations

import pickle
import pickletools
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from ._errors import UserError
from .stability import certificate_from_state_dict


def certify(path: str, input_bound: float) -> None:
    """Print the certificate of each recurrent layer in the file; `UserError` when there is none to be had."""
    console = Console(highlight=False)
    found, skipped = False, []
    for where, state_dict in state_dicts(load(path)):
        try:
            with warnings.catch_warnings(record=True) as remarks:  # why layers have no certificate
                warnings.simplefilter("always")
                certificates = certificate_from_state_dict(state_dict, input_bound)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error
        skipped += [str(remark.message).removeprefix("certificate: ") for remark in remarks]
        for name, certificate in certificates.items():
            found = True
            console.rule(Text(".".join(part for part in (where, name) if part) or "the model"), align="left")  # no markup
            console.print(str(certificate), soft_wrap=True, markup=False)
    if not found and skipped:
        raise UserError(f"{path}: no recurrent layer with a certificate: {'; '.join(skipped)}")
    if not found:
        raise UserError(f"{path}: no recurrent layer found (looked for tensors named weight_ih_l0, weight_hh_l0, ...)")
    for reason in skipped:
        print(f"stable-rnn certify: {reason}", file=sys.stderr)


def load(path: str) -> object:
    """What `torch.save` wrote, tensors and plain containers only."""
    if not Path(path).is_file():
        raise UserError(f"{path}: {'is a directory' if Path(path).is_dir() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's form, of which the one line below tells
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch reports a damaged file in many ways: RuntimeError, EOFError, KeyError, UnicodeDecodeError
        raise UserError(f"{path}: {_what_instead(path, error)}") from error


OBJECTS = "holds pickled Python objects{}, which are not loaded since they can run code; save model.state_dict() instead of the model"
PLAIN = "holds tensors that pickle wrote; write them with torch.save(model.state_dict(), ...)"
ARRAYS = "holds NumPy arrays or numbers{}, which are not loaded; save tensors: torch.from_numpy(array), float(number)"


def _what_instead(path: str, error: Exception) -> str:
    """What a file is that torch.load did not take. Nothing of it is run."""
    with open(path, "rb") as file:
        start = file.read(9)
    if path.endswith(".safetensors") or start[8:] == b"{":  # its header, JSON, comes after its length
        return "is a safetensors file; load it with safetensors.torch.load_file and write the state dict with torch.save"
    if "TorchScript" in str(error):
        return "is a TorchScript archive; save the state_dict() of torch.jit.load(...) with torch.save"
    named = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and named:
        return _of_globals(named[1], f" ({named[1]})")
    if start[:1] != b"\x80":
        return "not a PyTorch checkpoint"
    try:
        with open(path, "rb") as file:  # a plain pickle?
            found = [(op.name, arg) for op, arg, _ in pickletools.genops(file) if "GLOBAL" in op.name or isinstance(arg, str)]
            more = file.read(1)  # torch.save's old form is several pickles
    except Exception:
        more = b"damaged"
    if more:
        return "not a PyTorch checkpoint"
    if not any("GLOBAL" in name for name, _ in found):
        return "holds no tensors, plain Python values only (it was not written by torch.save)"
    return _of_globals(" ".join(str(arg) for _, arg in found))


def _of_globals(names: str, shown: str = "") -> str:
    """By the names of the Python objects that a pickle asks for."""
    if "_load_from_bytes" in names and "torch.nn" not in names:
        return PLAIN
    return (ARRAYS if "numpy" in names and "torch.nn" not in names else OBJECTS).format(shown)


def state_dicts(value: object) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Every mapping inside nested mappings, lists and tuples that holds recurrent weights, with the keys that lead to it."""
    waiting = [("", value, frozenset())]
    while waiting:
        where, value, around = waiting.pop()
        if not isinstance(value, (Mapping, list, tuple)) or id(value) in around:  # it may hold itself
            continue
        items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        if isinstance(value, Mapping) and any("weight_hh" in str(key) and isinstance(item, torch.Tensor) for key, item in items):
            yield where, value
        waiting += [(f"{where}.{key}" if where else str(key), item, around | {id(value)}) for key, item in reversed(items)]
