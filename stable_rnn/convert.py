"""`stabilize`: torch's recurrent modules become stable ones, in place. `unstabilize`: and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from .base import StableRNNBase
from .bookkeeping import Bookkeeping
from .gru import StableGRU
from .modules import StableLSTM, StableRNN
from .ops.backends import check_name
from .plans import PlanLike, Recurrent, plan_of
from .stability import Stability, check_stability, project_all_
from .stability.weights import mode_of
from .step_cells import StableCellBase, StableGRUCell, StableLSTMCell, StableRNNCell

_MODULES: dict[type[nn.Module], type[Bookkeeping]] = {nn.RNN: StableRNN, nn.GRU: StableGRU, nn.LSTM: StableLSTM}
_CELLS: dict[type[nn.Module], type[Bookkeeping]] = {
    nn.RNNCell: StableRNNCell,
    nn.GRUCell: StableGRUCell,
    nn.LSTMCell: StableLSTMCell,
}
_PLAIN = {form: plain for plain, form in (_MODULES | _CELLS).items()}
_NAMES = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}


def stabilize(
    model: nn.Module,
    stability: Stability | None = None,
    plan: PlanLike = Recurrent(),
    backend: str = "auto",
    project: bool = False,
    cells: bool = False,
) -> nn.Module:
    """Turn every `nn.RNN`, `nn.GRU` and `nn.LSTM` in `model` (itself included) into a `StableRNN`, `StableGRU`, `StableLSTM` and return
    the model.

    The modules become stable where they are, as the same objects: Parameters and what shares them, hooks, buffers, attributes, optimizers,
    wrappers and `torch.compile` around them stay, and whoever else holds such a module sees the change. By default the model computes what
    it did; `use_plan` and `module.plan` then change how, `module.stability` what is promised.

    stability  the modules' set. Values stay unchanged: `certificate()` tells whether they are inside, `project_()` moves them
    plan       how the modules run: one plan, a list of one per layer, or a dict by layer or (layer, direction); they fit every module
    backend    "auto", or the backend that must run them
    project    move the weights into the set now, all or none
    cells      also `nn.RNNCell`, `nn.GRUCell` and `nn.LSTMCell`, which become `StableRNNCell`, `StableGRUCell` and `StableLSTMCell`

    Left alone, with a warning that says why: subclasses, modules with a `forward` of their own, TorchScript and quantized
    modules, and computed weights (parametrizations, weight norm, spectral norm, pruning, flattened FSDP parameters). `fully_shard` comes
    after `stabilize`; DistributedDataParallel, DataParallel and `torch.compile` may come before or after.

    Raises `ValueError` if `model` holds nothing to swap, `stability` does not fit a module found, weights cannot be projected, or there is
    no set to project into; `TypeError` for a wrong plan or model. Nothing has changed then."""
    _check_model("stabilize", model)
    check_name(backend)
    if project and stability is None:
        raise ValueError("stabilize: project=True needs a set to project into, stability=Certified()")
    forms = _MODULES | _CELLS if cells else _MODULES
    targets: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, m in model.named_modules():
        why = _obstacle(m, forms)
        if why:
            left[name or "the model"] = why
        elif type(m) in forms:
            targets[name] = m
    if not targets:
        left |= {
            name or "the model": f"a {type(m).__name__} already"
            for name, m in model.named_modules()
            if isinstance(m, Bookkeeping)
        }
        akin = "; ".join(f"{name} is {why}" for name, why in left.items())
        akin = f" that can be swapped: {akin}" if akin else ""
        raise ValueError(
            f"stabilize: {type(model).__name__} holds no {'nn.RNN, nn.GRU, nn.LSTM or cell' if cells else 'nn.RNN, nn.GRU or nn.LSTM'}"
            f"{akin}"
        )
    for m in targets.values():
        check_stability(stability, mode_of(m), getattr(m, "proj_size", 0))
    plans = {
        name: plan_of(plan, m.num_layers, 1 + m.bidirectional) if isinstance(m, nn.RNNBase) else plan_of(plan, 1, 1)
        for name, m in targets.items()
    }
    for name, why in left.items():
        warnings.warn(f"stabilize: {name} is {why} and is left alone", stacklevel=2)
    for name, m in targets.items():
        mode, form = mode_of(m), forms[type(m)]
        m.__class__ = form
        if isinstance(m, StableCellBase):
            m._adopt(mode, stability, backend)
        elif isinstance(m, StableRNNBase):
            m._adopt(stability, plans[name], backend)
    if project:
        made = {name: m for name, m in targets.items() if isinstance(m, (StableRNNBase, StableCellBase))}
        try:
            _project(made)
        except BaseException:
            for stable in made.values():
                _revert(stable)
            raise
    return model


def unstabilize(model: nn.Module, allow_change: bool = False) -> nn.Module:
    """Turn every `StableRNN`, `StableGRU`, `StableLSTM` and cell in `model` (itself included) back into torch's, in place, and return
    the model.

    For what knows torch's own classes only: quantization, TorchScript, ONNX, `isinstance(m, nn.LSTM)`. Parameters, hooks, buffers and
    attributes stay the same objects, plans and stable sets are dropped: the model then runs plainly through whole sequences. A model
    without any stable module is returned as it is.

    Raises `ValueError`, before anything has changed, for modules that clamp their forget gate, which torch's cells do not do, unless
    `allow_change=True` drops the clamps; and for subclasses and parametrized or sharded modules. `TypeError` for a wrong model."""
    _check_model("unstabilize", model)
    found = {name or "the model": m for name, m in model.named_modules() if isinstance(m, Bookkeeping)}
    derived = [f"{name} is {_derived(m)}" for name, m in found.items() if type(m) not in _PLAIN]
    if derived:
        raise ValueError(f"unstabilize: {'; '.join(derived)}")
    clamped = [f"{name} at {m._cap}" for name, m in found.items() if m._cap < 1]
    if clamped and not allow_change:
        raise ValueError(
            f"unstabilize: forget gates are clamped, which torch's cells do not do: {', '.join(clamped)}; pass "
            "allow_change=True to drop the clamps"
        )
    for m in found.values():
        _revert(m)
    return model


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")


def _revert(m: Bookkeeping) -> None:
    for name in m._adopted:
        delattr(m, name)
    m.__dict__.pop("_sequence", None)
    m.__class__ = _PLAIN[type(m)]  # type: ignore[assignment]  # from here on it is no Bookkeeping


def _obstacle(m: nn.Module, forms: Mapping[type[nn.Module], type[Bookkeeping]]) -> str | None:
    """What a recurrent module is that cannot be swapped; None for one that can, and for all others."""
    scripted = isinstance(m, torch.jit.ScriptModule)
    name = getattr(m, "original_name", "") if scripted else type(m).__name__
    if name in _NAMES and scripted:
        return f"a TorchScript {name}, compiled already (stabilize before torch.jit.script or trace)"
    if name in _NAMES and type(m).__module__.startswith("torch.ao."):
        return f"a quantized {name}, {type(m).__module__}.{name} (stabilize the float model)"
    if isinstance(m, Bookkeeping) or not isinstance(m, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if type(m) in _CELLS and type(m) not in forms:
        return f"an nn.{name} (cells=True makes it a {_CELLS[type(m)].__name__})"
    if type(m) not in forms:
        return _derived(m)
    if "forward" in vars(m):
        return f"an nn.{name} with a forward of its own, which would go on running (del module.forward, stabilize, and wrap it again)"
    taken = [a for a in forms[type(m)]._adopted if hasattr(m, a)]
    if taken:
        return f"an nn.{name} with attributes of its own named {', '.join(taken)}, which a stable module needs (rename them)"
    computed = [
        w
        for w in (m._flat_weights_names if isinstance(m, nn.RNNBase) else ("weight_ih", "weight_hh"))
        if w not in m._parameters
    ]
    if computed:
        return (
            f"an nn.{name} with computed weights: {', '.join(computed)} (stabilize before weight norm, pruning or FSDP)"
        )
    return None


def _derived(m: nn.Module) -> str:
    """What an instance of a class of its own is, and the way out."""
    near = next(
        c for c in type(m).__mro__ if c.__module__.partition(".")[0] in ("torch", "stable_rnn") and not _made(c)
    )
    base = f"nn.{near.__name__}" if near.__module__.startswith("torch") else near.__name__
    if parametrize.is_parametrized(m):
        return f"a parametrized {base} (call torch.nn.utils.parametrize.remove_parametrizations first)"
    if _made(type(m)):
        return f"{base} sharded by fully_shard (call it after stabilize or unstabilize)"
    return f"{type(m).__module__}.{type(m).__qualname__}, a subclass of {base} (only {base} itself is swapped)"


def _made(c: type) -> bool:
    return c.__module__.startswith(("torch.distributed", "torch.nn.utils"))


def _project(modules: dict[str, StableRNNBase | StableCellBase]) -> None:
    """All of them, or none where one cannot be: the error then names it. Modules that share weights take turns until all are inside."""
    weights = {p: p.detach().clone() for m in modules.values() for p in m.parameters()}
    at = ""
    try:
        for at, m in modules.items():  # noqa: B007  the error names it
            m.project_()
        if len(weights) < sum(len(set(m.parameters())) for m in modules.values()):  # some are shared
            at = "the model"
            project_all_(list(modules.values()), certify=True)
    except BaseException as error:
        with torch.no_grad():
            for p, value in weights.items():
                p.copy_(value)
        if not isinstance(error, Exception):
            raise
        text = str(error).removeprefix("project_: ")
        joint = "" if not at else "." if text.startswith(("weight", "bias")) else ": "
        raise type(error)(f"stabilize: {at}{joint}{text}") from error
