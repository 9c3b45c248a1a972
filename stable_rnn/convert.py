"""`stabilize`: put stable modules in the place of torch's recurrent ones, with the same parameters."""
from __future__ import annotations

import warnings

from torch import nn

from .modules import StableLSTM, StableRNN, StableRNNBase
from .plans import Plan, Recurrent, check_plan
from .stability import Certified, Stability, check_stability


def stabilize(model: nn.Module, stability: Stability | None = Certified(), plan: Plan = Recurrent(), backend: str = "auto",
              project: bool = False) -> nn.Module:
    """Swap every `nn.RNN` and `nn.LSTM` in `model` (itself included) for `StableRNN`, `StableLSTM` and return the model.

    The swap happens in place and keeps the very `Parameter` objects and hooks, so optimizers and tied weights stay right; references to
    the old modules from outside of the tree stay what they are. Values stay unchanged unless `project=True`; `certificate()` tells
    whether they are stable, `project_()` makes them so. Left alone, with a warning: `nn.GRU`, and subclasses or parametrized forms of
    the others. Raises `ValueError` (before anything changes) if `model` holds nothing to swap or `stability` does not fit a module
    found, `TypeError` for a wrong plan or model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"stabilize: model must be an nn.Module, got {type(model).__name__}")
    check_plan(plan)
    found = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.RNNBase)}
    targets = {name: m for name, m in found.items() if type(m) in (nn.RNN, nn.LSTM)}
    if not targets:
        raise ValueError(f"stabilize: {type(model).__name__} holds no nn.RNN or nn.LSTM")
    for m in targets.values():
        check_stability(stability, m.mode)
    for name, m in found.items():
        if name not in targets and not isinstance(m, StableRNNBase):
            warnings.warn(f"stabilize: {name or 'the model'} is {type(m).__name__} and is left alone; only nn.RNN and nn.LSTM have a "
                          "stable form here", stacklevel=2)
    swaps: dict[int, nn.Module] = {}
    for name, m in targets.items():
        if id(m) not in swaps:
            swaps[id(m)] = _stable_form(m, stability, plan, backend)
            if project and stability is not None:
                swaps[id(m)].project_()
        if name == "":
            return swaps[id(m)]
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, swaps[id(m)])
    return model


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
