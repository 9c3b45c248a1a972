"""Weights that lie on several ranks: gloo processes on the CPU. What they end with is what one process ends with, or they are refused by
name."""

import pytest
import torch
import torch.distributed as dist
from ranks import needs_gloo, on_ranks
from torch import nn

from stable_rnn import Cascade, Certified, StableLSTM, StableRNN, certificate, project_after_step
from stable_rnn.functional import spectral_norm_bound
from stable_rnn.stability import certificate_from_state_dict

pytestmark = needs_gloo


def mesh(*sizes):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])


def values(module):
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().tolist()
        for name, p in module.named_parameters()
    }


def grown(module, scale=3.0):
    """Weights outside of the set, the same on every rank."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * scale)
    return module


MODULES = {
    "lstm": lambda: grown(StableLSTM(5, 6)),  # 24 rows
    "stack": lambda: grown(StableLSTM(5, 7, 2, bidirectional=True, proj_size=3, stability=Certified(0.9, "inf"))),
    "rnn": lambda: grown(StableRNN(3, 5, stability=Certified(0.8))),  # 5 rows: no two ranks have as many
    "small": lambda: grown(StableRNN(3, 1)),  # 1 row: some ranks have none
    "cascade": lambda: grown(StableLSTM(5, 7, 2, bidirectional=True, stability=Cascade(3))),
    "tied": lambda: _tied(grown(StableLSTM(4, 4, 2))),
}


def _tied(module):
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(module, f"{kind}_l1", getattr(module, f"{kind}_l0"))
    return module


def shard(module, *sizes, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=mesh(*sizes), **options)


def compare(module, sharded):
    """Steps and a certified projection of both, with the same noise: whether the values are bitwise alike, and the rates."""
    alike = []
    for certify in (False, False, True):
        for each in (module, sharded):
            torch.manual_seed(7)
            with torch.no_grad():
                for p in each.parameters():
                    p.add_(_as(torch.randn(p.shape) * 0.1, p))
            each.project_(certify=certify)
        alike.append(values(module) == values(sharded))
    local = [p.to_local().clone() for p in sharded.parameters()]
    sharded.project_()
    untouched = all(torch.equal(p.to_local(), old) for p, old in zip(sharded.parameters(), local))
    state = certificate_from_state_dict(sharded.state_dict())[""].rate
    return alike, untouched, sharded.certificate().rate, certificate(module).rate, state, module.stability.rate


def _as(value, p):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements) if hasattr(p, "placements") else value


def _fsdp(rank):
    found = {name: compare(make(), shard(make(), dist.get_world_size())) for name, make in MODULES.items()}
    from torch.distributed.tensor import Shard

    columns = shard(StableLSTM(4, 4), dist.get_world_size(), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with torch.no_grad():
        for p, q in zip(columns.parameters(), grown(StableLSTM(4, 4)).parameters()):
            p.copy_(_as(q.detach(), p))
    found["columns"] = compare(grown(StableLSTM(4, 4)), columns)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_fully_sharded_weights_end_as_in_one_process(two, four, ranks):
    for found in {2: two, 4: four}[ranks]["_fsdp"]:
        for name, (alike, untouched, rate, plain, _, allowed) in found.items():
            assert alike == [True] * 3 and untouched, name
            assert rate == plain <= allowed, name


def _two_dimensions(rank):
    """HSDP; tensor parallelism alone, in rows and columns; and both, where rows are divided twice."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def placed(module, on, placements):
        for name, p in list(module.named_parameters()):
            setattr(
                module,
                name,
                nn.Parameter(
                    distribute_tensor(
                        p.detach(), on, [q if q.is_replicate() or q.dim < p.dim() else Replicate() for q in placements]
                    )
                ),
            )
        return module

    make, both = MODULES["lstm"], mesh(2, 2)
    return {
        "hsdp": compare(make(), shard(make(), 2, 2)),
        "rows and columns": compare(make(), placed(make(), both, (Shard(0), Shard(1)))),
        "replicas": compare(make(), placed(make(), both, (Replicate(), Replicate()))),
        "rows twice": compare(make(), placed(make(), both, (Shard(0), Shard(0)))),
        "fsdp over tensor parallel": compare(
            make(), fully_shard(placed(make(), both["b"], (Shard(0),)), mesh=both["a"])
        ),
    }


def test_two_dimensions_of_ranks(four):
    for found in four["_two_dimensions"]:
        for name, (alike, untouched, rate, plain, _, allowed) in found.items():
            assert alike == [True] * 3 and untouched, name
            assert rate == plain <= allowed, name


def _ranks_that_differ(rank):
    """Machines that round in other ways, made large."""
    from stable_rnn.stability import projection

    exact = projection._project_layers

    def rounded(weights, *rest):
        moved = exact(weights, *rest)
        with torch.no_grad():
            weights["weight_hh_l0"].mul_(1 - 0.01 * rank)
        return moved

    projection._project_layers = rounded
    module = shard(MODULES["lstm"](), 2)
    module.project_()
    whole = module.weight_hh_l0.full_tensor().detach()
    alone = MODULES["lstm"]()
    projection._project_layers = exact
    alone.project_()
    return torch.equal(whole, alone.weight_hh_l0.detach())


def test_the_first_rank_decides(two):
    assert two["_ranks_that_differ"] == [True, True]


def _training(rank):
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for kind in ("fsdp", "root", "ddp", "cascade"):
        torch.manual_seed(0)
        model = nn.Sequential(StableLSTM(5, 6, stability=Cascade(3) if kind == "cascade" else Certified()))
        if kind == "fsdp":
            shard(model[0], 2)
        model = DistributedDataParallel(model) if kind == "ddp" else shard(model, 2)
        optimizer = torch.optim.Adam(model.parameters(), 0.2)
        if kind != "cascade":  # its gradients keep it inside
            project_after_step(optimizer, model)
        lstm = model.module[0] if kind == "ddp" else model[0]
        torch.manual_seed(rank)
        for _ in range(6):
            model(torch.randn(7, 4, 5))[0].square().sum().backward()
            optimizer.step(), optimizer.zero_grad()
        stepped = lstm.certificate().rate
        lstm.project_()
        found[kind] = values(lstm), stepped, lstm.certificate().rate
    return found


def test_training(two):
    """Under FSDP2 and DDP, with other data on each rank: all ranks end with the same weights, in the set."""
    first, second = two["_training"]
    assert first == second
    for _, stepped, rate in first.values():
        assert stepped < 1 and rate <= 0.99


def _lent(rank):
    lstm = StableLSTM(5, 6)
    model = shard(nn.Sequential(lstm), 2)
    before, said = lstm.certificate().rate, []
    with torch.no_grad():
        model(torch.randn(3, 2, 5))  # the root keeps what it gathered
    rate = lstm.certificate().rate
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (lstm.project_, lambda: lstm.project_(certify=False), lambda: project_after_step(optimizer, model)):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    model.reshard()
    lstm.project_()
    return before == rate, said


def _lent_four(rank):
    smaller = StableLSTM(4, 4)
    outer = shard(nn.Sequential(shard(smaller, 4, reshard_after_forward=2)), 4)
    with torch.no_grad():
        outer(torch.randn(3, 2, 4))
    try:
        smaller.project_()
    except ValueError as error:
        return str(error)


def test_what_is_lent_for_a_pass_is_not_written(two, four):
    text = "weight_ih_l0 is the gathered copy that fully_shard lends for a pass"
    for same, said in two["_lent"]:
        assert same and len(said) == 3 and all(text in each for each in said)
    assert all(text in said for said in four["_lent_four"])


def _sums_of_parts(rank):
    from torch.distributed.tensor import DTensor, Partial

    said = []
    module = StableRNN(3, 4)
    module.weight_hh_l0 = nn.Parameter(DTensor.from_local(module.weight_hh_l0.detach(), mesh(2), [Partial()]))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for call in (
        module.project_,
        lambda: module.project_(certify=False),
        lambda: project_after_step(optimizer, module),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    try:
        spectral_norm_bound(module.weight_hh_l0)
    except TypeError as error:
        said.append(str(error))
    return said


def test_sums_of_parts_are_refused(two):
    for said in two["_sums_of_parts"]:
        assert (
            len(said) == 4
            and all("weight_hh_l0 has the placements" in each for each in said[:3])
            and "DTensor" in said[3]
        )


def _first_generation(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    found = []
    for whole in (True, False):
        torch.manual_seed(0)
        lstm = StableLSTM(5, 6)
        model = FSDP(nn.Sequential(lstm), device_id=torch.device("cpu"), use_orig_params=whole)
        said = []
        for call in (lstm.project_, lambda m=model: project_after_step(torch.optim.SGD(m.parameters(), 0.1), m)):
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        if whole:
            try:
                lstm.certificate()
            except ValueError as error:
                said.append(str(error))
            with FSDP.summon_full_params(model):
                with torch.no_grad():
                    lstm.weight_hh_l0.mul_(10)
                lstm.project_()
            with FSDP.summon_full_params(model):
                said.append(lstm.certificate().rate)
        found.append(said)
    return found


def test_fsdp1_is_refused_with_the_way_out(two):
    for whole, flat in two["_first_generation"]:
        assert len(whole) == 4 and len(flat) == 2 and whole[3] <= 0.99
        assert all(
            "weight_" in each and "summon_full_params" in each and "fully_shard" in each for each in whole[:3] + flat
        )


def _zero_redundancy(rank):
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    torch.manual_seed(0)
    lstm = StableLSTM(5, 6)
    optimizer = ZeroRedundancyOptimizer(lstm.parameters(), torch.optim.SGD, lr=1.0)
    project_after_step(optimizer, lstm, certify=True)
    rates = []
    for _ in range(3):
        for p in lstm.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        rates.append(lstm.certificate().rate)
    inner = torch.optim.SGD(lstm.parameters(), 0.1)
    try:
        project_after_step(PostLocalSGDOptimizer(inner, None), lstm)
    except TypeError as error:
        return values(lstm), rates, str(error)


def test_optimizers_of_torch_distributed(two):
    """ZeroRedundancyOptimizer moves each rank's share and sends it around, then the hook runs; PostLocalSGDOptimizer has no hooks, and
    averages after the step of the optimizer inside."""
    first, second = two["_zero_redundancy"]
    assert first == second and max(first[1]) <= 0.99
    assert (
        "PostLocalSGDOptimizer runs no step hooks" in first[2] and "pass the SGD that it holds (.optim) if" in first[2]
    )


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, _fsdp, _ranks_that_differ, _training, _lent, _sums_of_parts, _zero_redundancy, _first_generation)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, _fsdp, _two_dimensions, _lent_four)


def test_zero3_parts_are_refused_with_the_way_out():
    """deepspeed leaves empty parameters behind."""
    lstm = StableLSTM(5, 6)
    optimizer = torch.optim.SGD(lstm.parameters(), 0.1)
    for p in lstm.parameters():
        p.data = torch.empty(0)
    for call in (
        lstm.project_,
        lstm.certificate,
        lambda: lstm.project_(certify=False),
        lambda: project_after_step(optimizer, lstm),
    ):
        with pytest.raises(
            ValueError, match=r"weight_ih_l0 of StableLSTM has the shape \(0,\), where \(24, 5\) .*GatheredParameters"
        ):
            call()
