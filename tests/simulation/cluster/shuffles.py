"""Experts that move while the steps of one epoch run: what its ranks do, by the docstrings of StageExperts, Shuffle
and CancelStage, and what must hold of all of them together at every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from drumline.engine.core.balance.config import BalanceConfig
from drumline.protocol.messages import CancelStage, I32Matrix, Shuffle, Staged, StageExperts, Step
from tests.simulation.cluster.rank_layer import NOTHING_STAGED, Move, RankLayer
from tests.simulation.cluster.stage_rules import StageRecord, check_bytes, stage_record
from tests.simulation.cluster.transfers import Post, Transfers
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.expert_slots import ExpertSlots
    from tests.simulation.cluster.rank import SimRank


class EpochShuffles:
    """``placement``: int32 (moe_layers, slots), what all ranks hold at the step that runs. ``is_free(process)``:
    whether its main thread is in no step."""

    def __init__(
        self, cluster: Cluster, experts: ExpertSlots, config: BalanceConfig, is_free: Callable[[SimRank], bool]
    ) -> None:
        self.cluster = cluster
        self.placement: I32Matrix = experts.configure.placement.copy()
        self.generations: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._experts = experts
        self._config = config
        self._is_free = is_free
        self._transfers = Transfers(cluster.clock, cluster.shape.transfer_s, cluster.stuck)
        self._stages: dict[int, StageRecord] = {}
        self._unaware: defaultdict[int, list[SimRank]] = defaultdict(list)

    # -------------------------------------------------------------------- what a rank is told

    def stage(self, process: SimRank, message: StageExperts) -> None:
        """The main thread of ``process`` comes to a StageExperts."""
        told = (message.term, message.generation)
        if told <= process.generation:
            process.out_of_order(f"is to stage generation {told} after {process.generation}")
            return
        if process.layer is not None and not process.layer.is_over:
            process.out_of_order(f"is to stage generation {message.generation}: {process.layer} is under way")
            return
        record = self._stages.get(message.generation)
        if record is None:
            now, count = self.placement[message.layer], self.cluster.shape.num_experts
            record = self._stages[message.generation] = stage_record(message, now, self._experts, count)
        if not record.same(message) or process.rank not in record.ranks:
            raise RuleBrokenError(f"{process} is told {message}, others of {record}")
        if process in self._unaware[message.generation]:
            process.out_of_order(f"is to stage generation {message.generation} after a step that names it")
            return
        process.generation = told
        process.layer = RankLayer(message, record.moves)
        self.poll(process)

    def cancel(self, process: SimRank, message: CancelStage) -> None:
        """The main thread of ``process`` comes to a CancelStage."""
        layer = process.layer
        if layer is None or layer.message.generation != message.generation or layer.cancelled or layer.committed:
            process.out_of_order(f"is to give up generation {message.generation}, has {layer}")
            return
        self.cluster.clock.seen["stages_cancelled"] += 1
        layer.cancelled, layer.said = True, False
        self.poll(process)

    def begin(self, process: SimRank, step: Step) -> None:
        """The main thread of ``process`` comes to a step: what it does before it computes."""
        shuffle, layer = step.shuffle, process.layer
        if shuffle is None:
            return
        if layer is None or layer.message.generation != shuffle.generation:
            self._knows_not(process, shuffle)
            return
        run = process.run
        if shuffle.commit:
            self._commit(process, layer, step.step)
        if shuffle.end > shuffle.first and process.run is run:
            self._start(process, layer, shuffle)
        if shuffle.home_end > shuffle.home_first and process.run is run:
            self._home(process, layer, shuffle)

    def _knows_not(self, process: SimRank, shuffle: Shuffle) -> None:
        """Ranks of other stages are not told what moves."""
        record = self._stages.get(shuffle.generation)
        one_stage = self.cluster.shape.layout.pipeline_parallel_size == 1
        if one_stage or (record is not None and process.rank in record.ranks):
            process.out_of_order(f"gets a step with {shuffle} and has {process.layer}")
            return
        self._unaware[shuffle.generation].append(process)

    # -------------------------------------------------------------------- parts

    def _start(self, process: SimRank, layer: RankLayer, shuffle: Shuffle) -> None:
        if shuffle.first != layer.named or shuffle.end > layer.num_parts or layer.cancelled or layer.committed:
            process.out_of_order(f"is to start parts {shuffle.first} to {shuffle.end} of {layer}")
            return
        layer.named = shuffle.end
        parts = layer.of_parts(shuffle.first, shuffle.end)
        check_bytes(process.rank, [move for _, move in parts], layer.message.parts, self._config)
        mine = [(number, move) for number, move in parts if process.rank in (move.source, move.receiver)]
        for number, move in mine:
            self._start_part(process, layer, number, move)
        if mine:
            self.cluster.faults.point(process, "staging")

    def _start_part(self, process: SimRank, layer: RankLayer, number: int, move: Move) -> None:
        key = (layer.message.generation, number)
        if move.source != process.rank:
            layer.under_way += 1
            post = Post(process, key, partial(self._received, process, layer, move))
            self._transfers.receive(move.source, post)
            return
        self._check_source(process, layer, move)
        if move.is_local:
            layer.parts.setdefault(move.slot, []).append(move.expert)
            return
        layer.under_way += 1
        content = int(process.held[layer.message.layer, move.source_slot])
        self._transfers.send(move.receiver, Post(process, key, partial(self._sent, process, layer, move), content))

    def _check_source(self, process: SimRank, layer: RankLayer, move: Move) -> None:
        held = process.held[layer.message.layer]
        if move.source_slot >= len(held) or int(held[move.source_slot]) != move.expert:
            raise RuleBrokenError(f"{move} of {layer.message} from {process}, which holds {held.tolist()}")

    def _sent(self, process: SimRank, layer: RankLayer, move: Move, content: int) -> None:
        if process.layer is layer:
            layer.under_way -= 1
            self._check_source(process, layer, move)
            self.poll(process)

    def _received(self, process: SimRank, layer: RankLayer, move: Move, content: int) -> None:
        if process.layer is layer:
            layer.under_way -= 1
            layer.parts.setdefault(move.slot, []).append(content)
            self.poll(process)

    def poll(self, process: SimRank) -> None:
        """Say what is through: after each step, and while there is nothing else to do."""
        layer = process.layer
        if layer is None or layer.said or layer.committed or not layer.is_through:
            return
        if process.hung or process.run is None or not self._is_free(process):
            return
        layer.said = True
        record, told = self._stages[layer.message.generation], process.left
        if layer.cancelled:
            layer.parts.clear()
            process.send(Staged(*told, process.rank, layer.message.generation, dropped=True))
            return
        mine = [move for move in layer.moves if move.receiver == process.rank]
        if any(layer.staged(move.slot) != move.expert for move in mine):
            raise RuleBrokenError(f"{process} has {layer.parts} of {mine} in its staging buffers")
        record.staged.add(process.rank)
        size = self._config.expert_bytes * sum(not move.is_local for move in mine)
        process.send(Staged(*told, process.rank, layer.message.generation, size, 0.01))
        self.cluster.faults.point(process, "staged")

    # -------------------------------------------------------------------- the commit, and home

    def _commit(self, process: SimRank, layer: RankLayer, step: int) -> None:
        if layer.committed or layer.cancelled:
            process.out_of_order(f"is to commit {layer}")
            return
        held = process.held[layer.message.layer]
        for move in layer.moves:
            if move.receiver != process.rank:
                continue
            if layer.staged(move.slot) == NOTHING_STAGED:
                raise RuleBrokenError(f"{process} is to commit {layer.message}, and has staged only {layer.parts}")
            layer.retired[move.slot] = int(held[move.slot])
            held[move.slot] = layer.staged(move.slot)
        record = self._stages[layer.message.generation]
        if record.staged != record.ranks:
            raise RuleBrokenError(f"{layer.message} is committed, and only {record.staged} are staged")
        record.commit_step = step
        layer.committed = True
        self.generations[process.rank, layer.message.layer] = layer.message.generation
        self.cluster.clock.seen["commits_of_layers"] += 1
        self.cluster.faults.point(process, "commit")

    def _home(self, process: SimRank, layer: RankLayer, shuffle: Shuffle) -> None:
        if not layer.committed or shuffle.home_first != layer.rounds_home or shuffle.home_end > layer.num_rounds:
            process.out_of_order(f"is to copy home rounds {shuffle.home_first} to {shuffle.home_end} of {layer}")
            return
        record = self._stages[layer.message.generation]
        if record.answered != record.ranks:
            raise RuleBrokenError(f"{process} copies home, only {record.answered} have answered the commit")
        rounds = range(shuffle.home_first, shuffle.home_end)
        mine = [move for move in layer.moves if move.receiver == process.rank and move.round in rounds]
        for local in (False, True):
            check_bytes(process.rank, [move for move in mine if move.is_local == local], 1, self._config)
        for move in mine:
            del layer.retired[move.slot]
        layer.rounds_home = shuffle.home_end
        self.cluster.faults.point(process, "home")

    def answered(self, process: SimRank, step: int) -> None:
        """``process`` has answered a step."""
        layer = process.layer
        if layer is not None and layer.committed:
            record = self._stages[layer.message.generation]
            if record.commit_step == step:
                record.answered.add(process.rank)

    # -------------------------------------------------------------------- all together

    def check(self, step: Step, order: list[SimRank], believed: I32Matrix | None) -> bool:
        """All ranks are in ``step``. Nothing is mixed: each layer is the same generation everywhere, and every slot
        holds what the placement, which is also the one that the coordinator believes in, says. Returns False when a
        rank has found a message missing."""
        shuffle = step.shuffle
        if shuffle is not None and not self._all_know(shuffle):
            return False
        if shuffle is not None and shuffle.commit:
            message = self._stages[shuffle.generation].message
            self.placement[message.layer] = message.placement
        for layer in range(len(self.placement)):
            ranks = [order[place].rank for place in self._experts.places_of(layer)]
            if len({self.generations[rank, layer] for rank in ranks}) > 1:
                found = {rank: self.generations[rank, layer] for rank in ranks}
                raise RuleBrokenError(f"step {step.step} runs layer {layer} in generations {found}")
        for place, process in enumerate(order):
            wanted = self._experts.share(self.placement, place)
            if not np.array_equal(process.held, wanted):
                text = f"in step {step.step} {process} holds {process.held.tolist()}"
                raise RuleBrokenError(f"{text}, and should hold {wanted.tolist()}")
        if believed is not None and not np.array_equal(believed, self.placement):
            text = f"in step {step.step} the coordinator takes {believed.tolist()} for the placement"
            raise RuleBrokenError(f"{text}, which is {self.placement.tolist()}")
        return True

    def _all_know(self, shuffle: Shuffle) -> bool:
        record = self._stages.get(shuffle.generation)
        unaware = self._unaware.pop(shuffle.generation, [])
        if record is None:
            # Somebody should know: who may have missed a message.
            unaware.sort(key=lambda process: not process.tampered)
        for process in unaware:
            if record is None or process.rank in record.ranks:
                process.out_of_order(f"got a step with {shuffle}, and does not know what that is")
                return False
        return True
