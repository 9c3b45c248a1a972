"""Reads checkpoints of unknown origin: tensors and plain containers, of torch.save or safetensors. No code of the file is run."""

from __future__ import annotations

import _compat_pickle
import itertools
import json
import os
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ._errors import UserError, printable

ZIP = b"PK\x03\x04"  # how a file of torch.save starts
OLD = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the same before torch 1.6, after the two bytes of the pickle's protocol
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
CUT = "is damaged or cut short"
OBJECTS = "holds pickled Python objects{}, which are not loaded since they can run code; save model.state_dict() instead of the model"
OTHER = "holds what is not read without running code of the file ({}); write model.state_dict() with torch.save, nothing else"
PLAIN = "holds tensors that pickle wrote; write them with torch.save(model.state_dict(), ...)"
ARRAYS = "holds NumPy arrays or numbers{}, which are not loaded; save tensors: torch.from_numpy(array), float(number)"
NONE = "no recurrent layer found (looked for tensors named weight_ih_l0, weight_hh_l0, ...)"
PLAIN_OBJECTS = {"_codecs encode", "builtins bytearray", "builtins complex", "builtins set"}
OF_TENSORS = {
    "torch",
    "torch._utils",
    "torch._tensor",
    "torch.nn.parameter",
    "torch.serialization",
    "torch.storage",
    "collections",
}
RECURRENT = re.compile(r"(weight_[ih]h|weight_hr|bias_[ih]h)(?![a-z])")


class StandIn:
    """In the place of every Python object that a checkpoint asks for: nothing of that object is imported or called."""

    def __new__(cls, *args: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class DictStandIn(StandIn):
    """The same for subclasses of dict, such as `defaultdict`: their items are kept."""

    def __new__(cls, *args: object) -> OrderedDict:  # type: ignore[misc]  # a dict in the place of the object asked for
        return OrderedDict()


def load(path: str) -> tuple[object, set[str]]:
    """What the file holds, and the names of the Python objects in it that were passed over. `UserError` says what the file is instead."""
    try:
        return _load(path)
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"{printable(path)}: is too large for this machine's memory") from error


def _load(path: str) -> tuple[object, set[str]]:
    _check_kind(path)
    with open(path, "rb") as file:
        start = file.read(2 + len(OLD))
        if start.startswith(ZIP):
            return _of_torch(file, _globals_in_zip(file))
        if start.startswith(OLD, 2):
            return _of_torch(file, _globals_in_pickles(file))
    if not start:
        raise UserError("is empty")
    if path.endswith(".safetensors") or start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**40:
        return _safetensors(path), set()  # a header's length, then the header, which is JSON
    raise UserError(_what_instead(path, start))


def _check_kind(path: str) -> None:
    """A look that opens nothing: a pipe would wait for its writer."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, ValueError):  # ValueError: a NUL in the name
        raise UserError("no such file") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"is a directory; name a file{_candidates(Path(path))}")
    if not stat.S_ISREG(mode):
        raise UserError(
            f"is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file; copy what it gives to a file"
        )


def _candidates(folder: Path) -> str:
    """The files in a folder that look like checkpoints."""
    if (folder / ".metadata").exists():
        return ": it is of torch.distributed.checkpoint, and torch.distributed.checkpoint.format_utils.dcp_to_torch_save writes one"
    ends = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(ends))
    return " in it" + (f": {', '.join(map(printable, found[:3]))}{', ...' * (len(found) > 3)}" if found else "")


def _globals_in_zip(file: BinaryIO) -> set[str]:
    """The names that the pickle in an archive asks for."""
    try:
        with zipfile.ZipFile(file) as archive:
            files = archive.infolist()
            names = [info.filename for info in files]
            pickled = next((name for name in names if name.endswith("/data.pkl") or name == "data.pkl"), None)
            if any(name.endswith("/constants.pkl") for name in names):
                raise UserError(
                    "is a TorchScript archive; save the state_dict() of torch.jit.load(...) with torch.save"
                )
            if any(name.endswith("/models/model.json") or "serialized_exported_program" in name for name in names):
                raise UserError("is an exported program; save the state_dict of torch.export.load(...) with torch.save")
            if any(name.endswith(".npy") for name in names):
                raise UserError(ARRAYS.format(""))
            if pickled is None:
                raise UserError("is a zip archive, but not one that torch.save wrote")
            if sum(info.file_size for info in files) > os.fstat(file.fileno()).st_size:
                raise UserError(
                    "is a compressed archive, which torch.save does not write; unpack it, or load and save it with torch"
                )
            return set(_asked_for(archive.read(pickled)))
    except UserError:
        raise
    except Exception as error:  # zipfile and pickletools report damage in many ways
        raise UserError(CUT) from error


def _globals_in_pickles(file: BinaryIO) -> set[str]:
    """The same for the form before 1.6: magic number, version, system, the checkpoint itself, then storages."""
    file.seek(0)
    try:
        return {name for _ in range(4) for name in _asked_for(file)}
    except Exception as error:
        raise UserError(CUT) from error


def _asked_for(pickled: bytes | BinaryIO) -> Iterator[str]:
    """Names of Python objects, as Python 3 knows them."""
    for op, arg, _ in pickletools.genops(pickled):
        if op.name == "GLOBAL":
            assert arg is not None
            module, _, name = arg.partition(" ")
            module, name = _compat_pickle.NAME_MAPPING.get(
                (module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
            )
            yield f"{module} {name}"


def _of_torch(file: BinaryIO, names: set[str]) -> tuple[object, set[str]]:
    """`names`: of all objects that its pickle asks for, "module name"."""
    file.seek(0)
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        made for name in sorted(names)[:1000] if (made := _stand_in(*name.split(" ", 1)))
    ]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # about the file's form, of which the one line below tells
            value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(OBJECTS.format(f" ({named[1]})") if named else OTHER.format(_reason(error))) from error
    except RuntimeError as error:
        if "memory" in str(error):
            raise MemoryError from error
        raise UserError(f"{CUT} ({_reason(error)})") from error
    except (
        Exception
    ) as error:  # torch reports a damaged file in many ways: EOFError, KeyError, OSError, UnicodeDecodeError
        raise UserError(f"{CUT} ({_reason(error)})") from error
    return value, {
        name.replace(" ", ".") for name in names if name not in PLAIN_OBJECTS and name.split()[0] not in OF_TENSORS
    }


def _stand_in(module: str, name: str) -> type | None:
    """A class of this name. torch takes what it knows itself (`torch._utils._rebuild_tensor_v2`) before any of these."""
    base = DictStandIn if name.lower().endswith("dict") else StandIn
    try:
        return type(name, (base,), {"__module__": module, "__qualname__": name})
    except ValueError:  # no name of a class; torch will refuse it
        return None


def _reason(error: Exception) -> str:
    text = (
        str(error).rpartition("WeightsUnpickler error:")[2].strip()
    )  # torch wraps its reason in advice about weights_only=False
    return printable(text.partition("\n")[0].partition(". ")[0] or type(error).__name__)


def _safetensors(path: str) -> dict[str, torch.Tensor]:
    """The weights of recurrent layers alone."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("is a safetensors file, which needs a package: pip install 'stable-rnn[safetensors]'") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if RECURRENT.search(name)}
    except SafetensorError as error:
        raise UserError(f"{CUT}, or no safetensors file ({_reason(error)})") from error


def _what_instead(path: str, start: bytes) -> str:
    """What a file is that torch.save did not write."""
    if start.lstrip().startswith(b"{"):
        return _of_index(path)
    if start.startswith(b"\x93NUMPY"):
        return ARRAYS.format("")
    if start[:1] != b"\x80":
        return "not a PyTorch checkpoint"
    try:
        with open(path, "rb") as file:  # a plain pickle?
            found = [
                (op.name, arg) for op, arg, _ in pickletools.genops(file) if "GLOBAL" in op.name or isinstance(arg, str)
            ]
            more = file.read(1)
    except Exception:
        more = b"damaged"
    if more:
        return "not a PyTorch checkpoint"
    if not any("GLOBAL" in name for name, _ in found):
        return "holds no tensors, plain Python values only (it was not written by torch.save)"
    names = " ".join(str(arg) for _, arg in found)
    if "_load_from_bytes" in names and "torch.nn" not in names:
        return PLAIN
    return (ARRAYS if "numpy" in names and "torch.nn" not in names else OBJECTS).format("")


def _of_index(path: str) -> str:
    """About `model.safetensors.index.json` and the like: which tensor lies in which of several files."""
    try:
        with open(path, encoding="utf-8") as file:
            files = json.loads(file.read(2**28))["weight_map"]
        parts = sorted({str(part) for name, part in files.items() if RECURRENT.search(name)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "not a PyTorch checkpoint"
    if not parts:
        return f"is the index of a checkpoint in several files; {NONE}"
    shown = ", ".join(map(printable, itertools.islice(parts, 8)))
    return f"is the index of a checkpoint in several files; its recurrent layers are in {shown}{', ...' * (len(parts) > 8)}"


def nothing_found(passed_over: set[str]) -> str:
    """What to say of a file without recurrent weights, which may lie in objects that were passed over."""
    if not passed_over:
        return NONE
    shown = sorted(passed_over)
    names = f" ({', '.join(map(printable, shown[:3]))}{', ...' * (len(shown) > 3)})"
    numpy = all(name.startswith("numpy") for name in shown)
    return f"{NONE}; it {(ARRAYS if numpy else OBJECTS).format(names)}"
