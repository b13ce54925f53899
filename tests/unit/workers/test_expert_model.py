"""A decoder as the mixture of experts that balancers ask for: it counts and routes by what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drumline.engine import EPLBConfig, ParallelConfig
from drumline.engine.core.fetches import fetches
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32, I32Matrix
from drumline.workers.experts import EplbState, MixtureOfExperts, is_mixture_of_experts
from drumline.workers.layers.expert_maps import ExpertMaps
from drumline.workers.models import Decoder
from tests.checkpoints import Checkpoints
from tests.parity.rows import Stream
from tests.parity.stepdriver import StepDriver
from tests.parity.threadworld import ThreadWorld, on_each

CPU = torch.device("cpu")
EP2: dict[str, Any] = {"data_parallel_size": 2, "enable_expert_parallel": True}
LAYERS, EXPERTS, TOP_K = 3, 8, 2
INITIAL = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


class RedundantWorld(ThreadWorld):
    """Two ranks with five slots each: all experts, then copies of the first two."""

    def planned(self, members: Any, parked: Any = ()) -> tuple[I32Matrix, I32, I32Matrix]:
        wanted = np.tile(np.array(INITIAL, dtype=np.int32), (LAYERS, 1))
        held = {rank: self.runners[rank].held() for rank in members}
        slots = np.array([5, 5], dtype=np.int32)
        return wanted, slots, fetches(held, wanted, [5, 5], [members], [0] * LAYERS, dict.fromkeys(members, 0))


@pytest.fixture
def folder(checkpoints: Checkpoints) -> Path:
    return checkpoints("qwen3-moe")


def streams(seed: int) -> list[Stream]:
    draw = np.random.default_rng(seed)
    return [Stream(draw.integers(3, 60, int(draw.integers(2, 20))).tolist(), 12) for _ in range(4)]


def computed(driver: StepDriver, seeds: tuple[int, ...]) -> list[list[Stream]]:
    runs = []
    for seed in seeds:
        run = streams(seed)
        driver.run([run[place :: len(driver.replicas)] for place in range(len(driver.replicas))])
        runs.append(run)
    return runs


def build(world: RedundantWorld) -> dict[int, EplbState]:
    states: dict[int, EplbState] = {}
    balance = EPLBConfig(window_size=4, step_interval=4, num_redundant_experts=2)
    parallel = ParallelConfig(**EP2, enable_eplb=True, eplb_config=balance)

    def on(rank: int) -> None:
        model = world.runners[rank].model
        states[rank] = EplbState.build(model, CPU, parallel, ep_group=model.groups.experts)

    on_each((0, 1), on)
    return states


def test_a_decoder_says_what_it_holds(folder: Path) -> None:
    world = RedundantWorld(folder, **EP2)
    world.epoch((0, 1)).close()
    model = world.runners[1].model
    assert isinstance(model, MixtureOfExperts)
    assert is_mixture_of_experts(model)
    counts = (model.num_moe_layers, model.num_logical_experts, model.num_routed_experts, model.num_physical_experts)
    assert counts == (LAYERS, EXPERTS, EXPERTS, 10)
    assert (model.num_local_physical_experts, model.num_redundant_experts, model.num_expert_groups) == (5, 2, 1)
    assert model.num_shared_experts == 0
    for (gate_up, down), moe in zip(model.expert_weights, model.moe_layers, strict=True):
        assert gate_up.data_ptr() == moe.experts.gate_up.data_ptr()
        assert len(gate_up) == len(down) == 5


def test_a_dense_decoder_is_no_mixture(checkpoints: Checkpoints) -> None:
    world = ThreadWorld(checkpoints("llama"))
    model = world.runners[0].model
    assert not is_mixture_of_experts(model)
    assert (model.num_moe_layers, model.num_physical_experts, model.num_expert_groups) == (0, 0, 1)


def test_text_is_the_same_before_and_after_experts_have_moved_and_every_token_is_counted(folder: Path) -> None:
    plain = ThreadWorld(folder)
    driver = plain.epoch((0,))
    expected = computed(driver, (1, 2))
    driver.close()
    world = RedundantWorld(folder, **EP2)
    driver = world.epoch((0, 1))
    states = build(world)
    found = computed(driver, (1,))
    tokens = sum(int(state.expert_load_pass.sum()) for state in states.values())
    before = {rank: [part.clone() for part in _flat(world.runners[rank].model)] for rank in (0, 1)}

    on_each((0, 1), lambda rank: states[rank].step(world.runners[rank].model))
    found += computed(driver, (2,))
    driver.close()

    assert states[0].physical_to_logical_map.tolist() == states[1].physical_to_logical_map.tolist()
    assert states[0].physical_to_logical_map.tolist() != [INITIAL] * LAYERS
    for rank in (0, 1):
        assert any(not torch.equal(a, b) for a, b in zip(before[rank], _flat(world.runners[rank].model), strict=True))
        assert states[rank].expert_load_pass.any()
    for run, other in zip(found, expected, strict=True):
        for stream, same in zip(run, other, strict=True):
            assert stream.generated == same.generated
            torch.testing.assert_close(torch.stack(stream.logits), torch.stack(same.logits), rtol=1e-4, atol=1e-4)
    assert tokens % (LAYERS * TOP_K) == 0
    assert tokens // (LAYERS * TOP_K) >= sum(len(stream.tokens) - 1 for stream in found[0])


def _flat(model: Decoder) -> list[Tensor]:
    return [tensor for layer in model.expert_weights for tensor in layer]


def test_what_is_written_into_the_maps_changes_the_routing(folder: Path) -> None:
    world = RedundantWorld(folder, **EP2)
    driver = world.epoch((0, 1))
    states = build(world)
    for state in states.values():
        # Nobody asks rank 1 for what both have: all go to the first copy.
        state.logical_to_physical_map[:, :2, 1] = -1
        state.logical_replica_count[:, :2] = 1
    computed(driver, (3,))
    driver.close()
    assert not states[1].expert_load_pass[:, 3:].any()
    assert states[0].expert_load_pass[:, :2].any()


def test_a_new_epoch_routes_by_its_own_placement_again(folder: Path) -> None:
    world = RedundantWorld(folder, **EP2)
    world.epoch((0, 1)).close()
    build(world)
    assert all(layer.routing.maps is not None for layer in world.runners[0].model.moe_layers)
    world.epoch((0, 1)).close()
    assert all(layer.routing.maps is None for layer in world.runners[0].model.moe_layers)


# ------------------------------------------------------------------------------------------------- choice among copies


def test_a_copy_of_this_rank_comes_first_and_others_take_turns() -> None:
    maps = ExpertMaps(torch.tensor([[0, 5, 7], [2, -1, -1], [1, 3, 6]]), torch.tensor([3, 1, 3]), 4, 6)
    experts = torch.tensor([[0, 2], [1, 2], [2, 0], [2, 1]])
    assert maps.slots_of(experts).tolist() == [[5, 3], [2, 6], [1, 5], [3, 2]]
    # Where the last call ended the next one goes on, so that steps of one token spread, too.
    assert [maps.slots_of(torch.tensor([[2]])).item() for _ in range(4)] == [6, 1, 3, 6]
    assert maps.slots_of(experts[:0]).shape == (0, 2)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("load", "slots", "counts", "said"),
    [
        ((3, 4), (3, 8, 3), (3, 8), r"expert_load_view.*\[3, 4\].*integers \(3, 5\)"),
        ((3, 5), (3, 8), (3, 8), r"logical_to_physical_map.*\[3, 8\].*integers \(3, 8, any\)"),
        ((3, 5), (3, 8, 3), (2, 8), r"logical_replica_count.*\[2, 8\]"),
    ],
)
def test_tensors_of_other_shapes_are_refused(
    load: tuple[int, ...], slots: tuple[int, ...], counts: tuple[int, ...], said: str, folder: Path
) -> None:
    world = RedundantWorld(folder, **EP2)
    world.epoch((0, 1)).close()
    model = world.runners[0].model
    tensors = [torch.ones(shape, dtype=torch.int64) for shape in (load, slots, counts)]
    with pytest.raises(InvalidConfig, match=said):
        model.set_eplb_state(*tensors)
    assert model.moe_layers[0].routing.maps is None


def test_channels_of_every_expert_cannot_be_balanced(folder: Path) -> None:
    world = ThreadWorld(folder, data_parallel_size=2)
    world.epoch((0, 1)).close()
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(InvalidConfig, match=r"enable_expert_parallel.*only whole experts"):
        world.runners[0].model.set_eplb_state(nothing, nothing, nothing)


def test_other_numbers_of_slots_are_taken_or_refused(folder: Path) -> None:
    world = RedundantWorld(folder, **EP2)
    world.epoch((0, 1)).close()
    model = world.runners[1].model
    model.update_physical_experts_metadata(9 + 1, 5)
    assert model.moe_layers[0].routing.owner_of_slot.tolist() == [0] * 5 + [1] * 5
    assert model.moe_layers[0].routing.first_slot == 5
    for total, local in ((8, 4), (12, 5)):
        with pytest.raises(InvalidConfig, match=f"num_local_physical_experts.*{local} of {total}"):
            model.update_physical_experts_metadata(total, local)
