"""`stable-rnn certify`: certificates of the recurrent layers in a checkpoint, without running any code of it."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console

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
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        skipped += [str(remark.message).removeprefix("certificate: ") for remark in remarks]
        for name, certificate in certificates.items():
            found = True
            console.rule(".".join(part for part in (where, name) if part) or "the model", align="left")
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
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "nsupported" in str(error):
            raise UserError(
                f"{path}: holds pickled Python objects, which are not loaded since they can run code; "
                "save model.state_dict() instead of the model"
            ) from error
        raise UserError(f"{path}: not a PyTorch checkpoint") from error
    except Exception as error:  # torch reports a damaged file in many ways: RuntimeError, EOFError, KeyError, UnicodeDecodeError
        raise UserError(f"{path}: not a PyTorch checkpoint") from error


def state_dicts(value: object, where: str = "") -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Every mapping inside nested mappings that holds recurrent weights, with the keys that lead to it."""
    if not isinstance(value, Mapping):
        return
    if any(isinstance(key, str) and "weight_hh" in key and isinstance(item, torch.Tensor) for key, item in value.items()):
        yield where, value
    for key, item in value.items():
        yield from state_dicts(item, f"{where}.{key}" if where else str(key))
