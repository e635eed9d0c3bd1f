"""Which adapter a call uses."""

import copy
import pickle

import pytest
import torch

from diffusers_msfp.errors import CheckpointError, ConfigError, UnsupportedError
from diffusers_msfp.methods.talora import AdapterBank, Route, RoutingTable, TimestepRouter


def table(*rows: list[int], adapters: int = 3) -> RoutingTable:
    return RoutingTable(torch.tensor(rows, dtype=torch.uint8), adapters)


def test_a_default_device_is_not_where_random_numbers_are_drawn():
    bank, found = AdapterBank((4, 3), 2, 2, device="cpu"), []
    router = TimestepRouter(10, 2)
    for device in ("cpu", "meta"):
        with torch.device(device):
            generator = torch.Generator("cpu").manual_seed(0)
            bank.initialise(generator)
            found.append([bank.down.clone(), router.gumbel(3, generator)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda t: torch.tensor([t, t, t])])
@pytest.mark.parametrize(("timestep", "adapter"), [(0, 0), (3, 2), (4, 1)])
def test_one_timestep_gives_one_adapter(kind, timestep, adapter):
    (route,) = table([0, 0, 2, 2, 1]).lookup(kind(timestep))
    assert route.uniform == adapter
    assert int(route.index) == adapter


def test_continuous_timesteps_take_the_nearest_entry():
    routing = table([0, 1, 2])
    assert [routing.lookup(t)[0].uniform for t in (0.4, 0.6, 1.4, 1.9, 3.0, -0.7)] == [0, 1, 1, 2, 2, 0]


@pytest.mark.parametrize("timestep", [3.5, -1.5, torch.tensor([0, 100]), float("nan")])
def test_timesteps_outside_the_table_are_refused(timestep):
    with pytest.raises(ConfigError, match="must lie within 0 … 2, where this router was trained, but"):
        table([0, 1, 2]).lookup(timestep)


def test_groups_choose_on_their_own():
    routes = table([0, 1], [2, 2]).lookup(1)
    assert [route.uniform for route in routes] == [1, 2]


def test_mixed_samples_get_their_own_adapter_in_their_own_rows():
    (route,) = table([0, 1, 2]).lookup(torch.tensor([2, 0, 2, 1]))
    calls = []

    def function(x, adapter):
        calls.append(adapter)
        return x * 10 + adapter

    x = torch.arange(8.0).view(8, 1)  # every sample stands twice
    expected = x * 10 + torch.tensor([2, 2, 0, 0, 2, 2, 1, 1.0])[:, None]
    assert torch.equal(route.apply(function, x, 3), expected)
    assert sorted(calls) == [0, 1, 2]
    with pytest.raises(UnsupportedError, match="multiple of as many rows, but got 6"):
        route.apply(function, x[:6], 3)


def test_a_layer_alone_must_be_told_the_timestep():
    routing = table([0, 1])
    with pytest.raises(UnsupportedError, match=r"within `with model.timestep_router.at\(timestep\):`"):
        routing.route(0)
    with routing.at(1):
        assert routing.route(0).uniform == 1
        with routing.at(0):
            assert routing.route(0).uniform == 0
        assert routing.route(0).uniform == 1
    with pytest.raises(UnsupportedError):
        routing.route(0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_know_the_table_and_no_running_call(again):
    routing = table([0, 1])
    with routing.at(1):
        other = again(routing)
    assert torch.equal(other.table, routing.table)
    assert other.lookup(1)[0].uniform == 1
    with pytest.raises(UnsupportedError):
        other.route(0)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3), torch.zeros(3, dtype=torch.uint8), torch.full((1, 3), 3, dtype=torch.uint8)]
)
def test_tables_that_no_training_wrote_are_refused(bad):
    with pytest.raises(CheckpointError, match="damaged file"):
        RoutingTable(bad, 3)


def test_usage_and_intervals():
    routing = table([0, 0, 2, 0])
    assert routing.usage() == [[0.75, 0.0, 0.25]]
    assert routing.intervals() == [[(0, 1, 0), (2, 2, 2), (3, 3, 0)]]


def test_route_by_tensor_equals_route_by_number():
    (route,) = table([0, 1, 2]).lookup(2)
    assert Route(route.index).apply(lambda x, k: x + k, torch.ones(2), 3).tolist() == [3, 3]


# ── the router while it learns ──────────────────────────────────────────────────────────────────────────────────


def test_every_timestep_gets_one_adapter_and_the_gradient_reaches_the_logits():
    router = TimestepRouter(1000, 3, groups=2)
    gate, probability = router(torch.tensor([0, 999]))
    assert gate.shape == probability.shape == (2, 2, 3)
    assert torch.equal(gate.sum(-1), torch.ones(2, 2))
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    (gate * torch.randn(gate.shape)).sum().backward()
    assert router.mlp[0].weight.grad.abs().sum() > 0


def test_warm_start_gives_equal_loads_contiguous_ranges():
    router = TimestepRouter(1000, 3)
    timesteps = [float(t) for t in range(0, 1000, 50)]
    router.warm_start(dict.fromkeys(timesteps, 1.0))
    chosen = router.table(timesteps)[0]
    assert chosen.diff().ne(0).sum() == 2  # three ranges
    assert torch.bincount(chosen.long()).min() > 250
    router.warm_start({t: 1.0 if t == 0 else 0.01 for t in timesteps})
    assert RoutingTable(router.table(timesteps), 3).intervals()[0][0][:2] == (0, 25)


def test_timesteps_between_those_of_training_choose_like_the_nearest():
    router = TimestepRouter(10, 2)
    router.warm_start({2.0: 1.0, 8.0: 1.0})
    row = router.table([2.0, 8.0])[0].tolist()
    assert row == [row[2]] * 6 + [row[8]] * 4
    assert row[2] != row[8]


def test_balance_loss_is_one_when_balanced_and_rises_with_collapse():
    router = TimestepRouter(1000, 2)
    timesteps = torch.arange(0, 1000, 100)
    router.warm_start({float(t): 1.0 for t in timesteps})
    assert abs(router.balance_loss(timesteps).item() - 1) < 0.05
    with torch.no_grad():
        router.mlp[2].bias += torch.tensor([20.0, 0.0])
    assert router.balance_loss(timesteps).item() > 1.9


def test_the_initial_router_does_not_disturb_the_user_s_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    TimestepRouter(10, 2, seed=3)
    assert torch.equal(torch.rand(1), expected)
