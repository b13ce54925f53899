"""One rank's model: applies steps to the batch table, computes them and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.errors import InvalidConfig, ProtocolError
from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32, NO_NUMBERS, I32Matrix, Step, WorkerConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.shards import rank_shards
from drumline.workers.attention_plan import plan_attention
from drumline.workers.batch import BatchTable, StepRows
from drumline.workers.collectives import Group
from drumline.workers.epoch_groups import StepGroups
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.rank_experts import RankExperts
from drumline.workers.kv_cache import KVCache, block_bytes, choose_num_blocks, free_memory, kv_dtype
from drumline.workers.loading import load_weights, resolve_dtype
from drumline.workers.models import Decoder, ModelBuild, StepContext
from drumline.workers.pipeline import Pipeline
from drumline.workers.sampler import sample
from drumline.workers.step_header import checked_counts
from drumline.workers.step_output import NO_OUTPUT, NumericFault, StepOutput
from drumline.workers.step_tokens import ReplicaPlace, StepTokens

__all__ = ["ModelRunner", "NumericFault", "StepOutput"]


class ModelRunner:
    """The part of a model that one rank holds, its KV cache and its batch table.

    Call :meth:`load` once, :meth:`init_kv_cache` once, then at each epoch :meth:`reset`, :meth:`refit` and :meth:`meet`
    with the epoch's groups, and :meth:`execute` for each step. ``layout`` is that of the whole world and ``rank`` this
    one's place there; ``place``, ``num_replicas`` and ``shards`` are those of the epoch. Not thread-safe: one thread
    runs it.
    """

    def __init__(self, config: WorkerConfig, spec: ModelSpec, device: torch.device, layout: Layout, rank: int):
        self.config = config
        self.spec = spec
        self.device = device
        self.layout = layout
        self.rank = rank
        self._take_place(layout, rank)
        self._model: Decoder | None = None
        self._cache: KVCache | None = None
        self._batch: BatchTable | None = None
        self._pipeline: Pipeline | None = None
        self._experts: RankExperts | None = None
        self._in_place = False
        self._spoil = False
        self._writing: StepRows | None = None
        self._dtype = torch.float32

    # ---------------------------------------------------------------------------------------------------------- start

    def load(self, experts: I32Matrix, progress: Callable[[int, int], None] | None = None) -> int:
        """Load what this rank holds of the model. ``experts``: int32 (MoE layers, slots), the expert in each of its own
        slots, or (0, 0) where every rank has all experts.

        Returns the bytes that were read. ``progress(done, total)`` is called in bytes. Raises InvalidConfig.
        """
        index = CheckpointIndex.open(self.config.model)
        self._dtype = resolve_dtype(self.config.dtype, index)
        self._check_experts(experts)
        length = self.config.max_model_len
        build = ModelBuild(self.spec, self.layout, self.rank, experts, length, self._dtype, self.device)
        model = Decoder(build)
        num_bytes = load_weights(model.plan, index, progress)
        model.finish_loading()
        self._experts = RankExperts.loaded(build, model.moe_layers, index, self.config.enable_eplb)
        self._model = model
        return num_bytes

    def _check_experts(self, experts: I32Matrix) -> None:
        layers = len(self.spec.moe_layers) if self.spec.is_moe and self.layout.enable_expert_parallel else 0
        if len(experts) != layers:
            valid = f"{layers}, one per MoE layer of the model" if layers else "none, where every rank has all experts"
            raise InvalidConfig("experts", f"{len(experts)} layers", valid)
        if experts.size and not 0 <= experts.min() <= experts.max() < self.spec.num_experts:
            found = f"experts {experts.min()} to {experts.max()}"
            raise InvalidConfig("experts", found, f"0 to {self.spec.num_experts - 1}")

    def init_kv_cache(self) -> tuple[int, int]:
        """Allocate the KV cache; returns (blocks, bytes per block). Raises InvalidConfig, saying what would fit."""
        config, spec, shards = self.config, self.spec, self.shards
        dtype = kv_dtype(config.kv_cache_dtype, self._dtype)
        num_blocks = choose_num_blocks(config, spec, shards, dtype, self.device)
        self._cache = KVCache(spec, shards, num_blocks, config.block_size, dtype, self.device)
        self._batch = BatchTable(
            config.max_num_seqs,
            config.max_model_len,
            num_blocks,
            config.block_size,
            spec.vocab_size,
            self.device,
        )
        return num_blocks, block_bytes(spec, shards, config.block_size, dtype)

    # --------------------------------------------------------------------------------------------------------- epochs

    def held(self) -> I32Matrix:
        """int32 (moe_layers, slots): the expert that stands in each slot now, -1 for none and in layers of other
        stages; (0, 0) where every rank has all experts. True at any time after :meth:`load`, however a refit ended."""
        return self.experts.held()

    def refit(
        self,
        epoch: EpochPlace,
        placement: I32Matrix,
        slots: I32,
        fetches: I32Matrix,
        transfer: Group | None,
        check: Callable[[], None],
        nodes: I32 = NO_NUMBERS,
    ) -> None:
        """Take this rank's place in ``epoch``, with the experts that it wants there; see :meth:`RankExperts.refit`.

        Steps are refused from here until it has succeeded, and on a parked rank.
        """
        self._in_place = False
        self.experts.refit(epoch, placement, slots, fetches, transfer, check, nodes)
        if epoch.parked:
            return
        self._take_place(epoch.layout, epoch.rank)
        self._in_place = True

    def _take_place(self, layout: Layout, rank: int) -> None:
        lockstep = self.spec.is_moe
        self.shards = rank_shards(layout, self.spec, rank)
        self.place = ReplicaPlace.of(layout, rank, lockstep=lockstep)
        self.num_replicas = layout.num_replicas if lockstep else layout.attention_data_parallel_size

    def meet(self, groups: StepGroups) -> None:
        """Compute with the ranks of ``groups`` from the next step on."""
        model = self.model
        model.groups.tp, model.groups.attn_tp, model.groups.experts = groups.tp, groups.attn_tp, groups.experts
        model.set_exchange(groups.exchange)
        self._pipeline = groups.pipeline

    def part(self) -> None:
        """The epoch is over: its groups and the buffers given to them are never used again."""
        self.model.leave_groups()
        self.experts.leave()
        self._pipeline = None

    def reset(self) -> None:
        """Forget all rows. Cached keys and values stay: rows that are admitted again may name their blocks."""
        if self._writing is not None:
            # The step that was left may have written NaN, and nobody was left to see it.
            blocks = np.unique(self._writing.slots // self.config.block_size)
            self.cache.scrub(self.batch.on_device(blocks))
            self._writing = None
        self.batch.reset()

    def close(self) -> None:
        """Drop weights and cache."""
        self._model = self._experts = self._cache = self._batch = None

    def free_bytes(self) -> int:
        """Bytes that are left on the device for more experts; on CPU those of the host, or of the process's cgroup."""
        return free_memory(self.device)

    @property
    def experts(self) -> RankExperts:
        """The routed experts; none in a dense model. Raises ProtocolError as :attr:`model` does."""
        if self._experts is None:
            raise ProtocolError("the model is not loaded")
        return self._experts

    @property
    def expert_load(self) -> Tensor:
        """Tokens that each expert slot has computed since its expert came, int64 (MoE layers of the stage, slots)."""
        return self.experts.load

    @property
    def model(self) -> Decoder:
        """The loaded model. Raises ProtocolError before :meth:`load` and after :meth:`close`."""
        if self._model is None:
            raise ProtocolError("the model is not loaded")
        return self._model

    @property
    def cache(self) -> KVCache:
        """The KV cache. Raises ProtocolError before :meth:`init_kv_cache` and after :meth:`close`."""
        if self._cache is None:
            raise ProtocolError("the KV cache is not allocated")
        return self._cache

    @property
    def batch(self) -> BatchTable:
        """The batch table. Raises ProtocolError before :meth:`init_kv_cache` and after :meth:`close`."""
        if self._batch is None:
            raise ProtocolError("the KV cache is not allocated")
        return self._batch

    # ----------------------------------------------------------------------------------------------------------- steps

    def spoil_next_logits(self) -> None:
        """For fault injection: in the next step that samples, what this rank computes for the first row that samples is
        NaN: its logits, or, from a stage without any, the hidden states that go on."""
        self._spoil = True

    @torch.inference_mode()
    def execute(self, step: Step) -> StepOutput:
        """Run one step.

        Raises ProtocolError, before any collective, when the step does not fit the table or its own header, and
        NumericFault when the model's output is not finite. After either the table is stale until :meth:`reset`.
        """
        if not self._in_place:
            raise ProtocolError(f"step {step.step} found a rank that has no place in an epoch")
        plan = self.batch.apply(step)
        stages, limit = self.layout.pipeline_parallel_size, self.config.max_num_batched_tokens
        counts = checked_counts(step, plan, self.place.replica, self.num_replicas, stages, limit)
        tokens = StepTokens.of(counts, self.place, step.step)
        if not plan.num_tokens:
            if sum(counts):
                self.model.dummy_step(tokens)
            return NO_OUTPUT
        self._writing = plan
        hidden = self._forward(plan, tokens, step.lane)
        pipeline, samples = self._pipeline, len(plan.sampling) > 0
        if samples and self._spoil:
            self._spoil = False
            hidden[plan.last_tokens[0]] = float("nan")
        if pipeline is not None and not pipeline.is_last:
            pipeline.send_hidden(hidden)
            if pipeline.is_first and samples:
                pipeline.expect_tokens(step.lane, plan.sampling_rows)
        elif samples:
            return self._sample(plan, hidden)
        self._advance(plan, None)
        return NO_OUTPUT

    def _advance(self, plan: StepRows, sampled: Tensor | None) -> None:
        self.batch.advance(plan, sampled)
        self._writing = None

    def _forward(self, plan: StepRows, tokens: StepTokens, lane: int) -> Tensor:
        batch, cache, model, pipeline = self.batch, self.cache, self.model, self._pipeline
        attention = plan_attention(plan, batch, cache)
        positions = batch.on_device(plan.positions)
        if pipeline is not None and pipeline.is_first:
            pipeline.take_tokens(lane, batch)
        if self.shards.first_stage or self.shards.last_stage:
            ids = batch.input_ids(plan)
            cache.tokens.index_copy_(0, attention.slots, ids.int())
        if pipeline is None or pipeline.is_first:
            x = model.embed(ids)
        else:
            x = pipeline.receive_hidden(plan.num_tokens, self.spec.hidden_size, self._dtype)
        hidden = model.hidden(x, StepContext(positions, attention, tokens, cache.keys, cache.values))
        # One cheap sum sees every NaN and infinity; which token it was is asked only after a fault.
        if not hidden.sum(dtype=torch.float32).isfinite():
            wrong = (~hidden.isfinite()).any(-1).nonzero().view(-1).cpu().numpy()
            rows = plan.rows[np.unique(np.searchsorted(plan.ends, wrong, side="right"))]
            raise self._numeric_fault(rows, "hidden states")
        return hidden

    def _sample(self, plan: StepRows, hidden: Tensor) -> StepOutput:
        """The first rank of the attention replica has the logits and samples; the others are told."""
        batch, group = self.batch, self.model.groups.attn_tp
        if not plan.each_token_samples:
            hidden = hidden.index_select(0, batch.on_device(plan.last_tokens))
        logits = self.model.logits(hidden)
        output = NO_OUTPUT
        if logits is not None:
            tokens, output = self._sample_from(logits, plan)
        else:
            tokens = torch.empty(len(plan.sampling), dtype=torch.int64, device=self.device)
        if group.world_size > 1:
            tokens = group.broadcast(tokens, group.ranks[0])
        if self._pipeline is not None:
            self._pipeline.send_tokens(tokens)
        self._advance(plan, tokens)
        return output

    def _sample_from(self, logits: Tensor, plan: StepRows) -> tuple[Tensor, StepOutput]:
        batch = self.batch
        if not logits.sum().isfinite():
            wrong = (~logits.isfinite()).any(-1).nonzero().view(-1).cpu().numpy()
            raise self._numeric_fault(plan.sampling_rows[wrong], "logits")
        rows = batch.sampling_rows(plan)
        penalised = rows.penalised()
        if len(penalised):
            rows.history = batch.history(plan.sampling_rows[penalised], self.cache.tokens)
        sampled = sample(logits, rows)
        tokens: Tensor = sampled.tokens
        ids = tokens.cpu().numpy().astype(np.int32)
        return tokens, StepOutput(ids, sampled.logprob_rows.astype(np.int32), sampled.logprobs)

    def _numeric_fault(self, rows: Sequence[int] | np.ndarray, what: str) -> NumericFault:
        batch = self.batch
        held = [batch.block_table[row, : batch.blocks_held[row]] for row in rows]
        self.cache.scrub(batch.on_device(np.unique(np.concatenate(held))))
        return NumericFault([int(row) for row in rows], what)
