"""`stabilize`: put stable modules in the place of torch's recurrent ones, with the same parameters."""
from __future__ import annotations

import warnings

import torch
from torch import nn

from . import dispatch
from .modules import StableLSTM, StableRNN, StableRNNBase
from .plans import Plan, Recurrent, check_plan
from .stability import Certified, Stability, check_stability


def stabilize(model: nn.Module, stability: Stability | None = Certified(), plan: Plan = Recurrent(), backend: str = "auto",
              project: bool = False) -> nn.Module:
    """Swap every `nn.RNN` and `nn.LSTM` in `model` (itself included) for `StableRNN`, `StableLSTM` and return the model.

    The swap happens in place and keeps the very `Parameter` objects and hooks, so optimizers and tied weights stay right; references to
    the old modules from outside of the tree stay what they are. Values stay unchanged unless `project=True`; `certificate()` tells
    whether they are stable, `project_()` makes them so. Left alone, with a warning: `nn.GRU`, and subclasses or parametrized forms of
    the others, those by hooks (weight norm, spectral norm, pruning) included. Raises `ValueError` if `model` holds nothing to swap,
    `stability` does not fit a module found or weights cannot be projected, `TypeError` for a wrong plan or model; nothing has changed
    then."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"stabilize: model must be an nn.Module, got {type(model).__name__}")
    check_plan(plan)
    found = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.RNNBase)}
    targets = {name: m for name, m in found.items() if _is_plain(m)}
    others = {name: m for name, m in found.items() if name not in targets and not isinstance(m, StableRNNBase)}
    if not targets:
        akin = ", ".join(f"{name or 'it'} is {_kind(m)}" for name, m in others.items())
        akin = f" that can be swapped: {akin}" if akin else ""
        raise ValueError(f"stabilize: {type(model).__name__} holds no nn.RNN or nn.LSTM{akin}")
    for m in targets.values():
        check_stability(stability, m.mode)
    dispatch.check_name(backend)
    for name, m in others.items():
        warnings.warn(f"stabilize: {name or 'the model'} is {_kind(m)} and is left alone; only nn.RNN and nn.LSTM have a stable form here",
                      stacklevel=2)
    swaps = {m: _stable_form(m, stability, plan, backend) for m in targets.values()}
    if project and stability is not None:
        _project({name: swaps[m] for name, m in targets.items()})
    for name, m in targets.items():
        if name == "":
            return swaps[m]
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, swaps[m])
    return model


def _is_plain(m: nn.RNNBase) -> bool:
    """Whether it holds its weights as parameters and nothing else: hooks that compute a weight leave other parameters or buffers."""
    return type(m) in (nn.RNN, nn.LSTM) and set(m._parameters) == set(m._flat_weights_names) and not m._buffers and not m._modules


def _kind(m: nn.RNNBase) -> str:
    return f"{type(m).__name__} with computed weights or tensors of its own" if type(m) in (nn.RNN, nn.LSTM) else type(m).__name__


def _project(modules: dict[str, StableRNNBase]) -> None:
    """All of them, or none where one cannot be: the error then names it."""
    before: dict[nn.Parameter, torch.Tensor] = {}
    for name, m in modules.items():
        before |= {p: p.detach().clone() for p in m.parameters() if p not in before}
        try:
            m.project_()
        except Exception as error:
            with torch.no_grad():
                for p, value in before.items():
                    p.copy_(value)
            text = str(error).removeprefix("project_: ")
            joint = "" if not name else "." if text.startswith(("weight", "bias")) else ": "
            raise type(error)(f"stabilize: {name}{joint}{text}") from error


def _stable_form(m: nn.RNNBase, stability: Stability | None, plan: Plan, backend: str) -> StableRNNBase:
    options = dict(num_layers=m.num_layers, bias=m.bias, batch_first=m.batch_first, dropout=m.dropout, bidirectional=m.bidirectional,
                   device="meta", stability=stability, plan=plan, backend=backend)
    if m.mode == "LSTM":
        new: StableRNNBase = StableLSTM(m.input_size, m.hidden_size, proj_size=m.proj_size, **options)
    else:
        new = StableRNN(m.input_size, m.hidden_size, nonlinearity=m.mode[4:].lower(), **options)
    for name, parameter in m.named_parameters():
        setattr(new, name, parameter)
    for name, hooks in vars(m).items():
        if "hooks" in name:  # the very dictionaries, so that handles given out before still remove their hooks
            new.__dict__[name] = hooks
    return new.train(m.training)
