"""One rank's model: applies steps to the batch table, computes them and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.errors import DrumlineError, ErrorInfo, InvalidConfig, ProtocolError
from drumline.protocol.layout import Layout
from drumline.protocol.messages import I32, LogprobEntry, Step, WorkerConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps
from drumline.protocol.shards import rank_shards
from drumline.workers.attention_plan import plan_attention
from drumline.workers.batch import BatchTable, StepRows
from drumline.workers.epoch_groups import StepGroups
from drumline.workers.kv_cache import KVCache, block_bytes, choose_num_blocks, kv_dtype
from drumline.workers.loading import load_weights, resolve_dtype
from drumline.workers.models import Decoder, ModelBuild, StepContext
from drumline.workers.pipeline import Pipeline
from drumline.workers.sampler import sample
from drumline.workers.step_tokens import ReplicaPlace, StepTokens

__all__ = ["ModelRunner", "NumericFault", "StepOutput"]

_NO_TOKENS = np.zeros(0, dtype=np.int32)


class NumericFault(DrumlineError):
    """NaN or infinity where a model's output should be. ``rows`` are the batch rows that it came from."""

    kind = "numeric"

    def __init__(self, rows: Sequence[int], what: str) -> None:
        shown = ", ".join(str(row) for row in rows)
        text = f"{what} are NaN or infinite in rows {shown}"
        super().__init__(text, ErrorInfo(kind=self.kind, text=text, field="rows", found=shown, valid="finite numbers"))
        self.rows = tuple(rows)


@dataclass(slots=True, frozen=True)
class StepOutput:
    """``tokens``: int32, of the rows that sampled, by ascending row. ``logprob_index``: int32, which of them asked for
    log probabilities; ``logprobs``: theirs."""

    tokens: I32
    logprob_index: I32
    logprobs: tuple[LogprobEntry, ...] = ()


_EMPTY = StepOutput(_NO_TOKENS, _NO_TOKENS)


class ModelRunner:
    """The part of a model that one rank holds, its KV cache and its batch table.

    Call :meth:`load` once, :meth:`init_kv_cache` once, then :meth:`reset` at each epoch, :meth:`meet` with the epoch's
    groups, and :meth:`execute` for each step. Not thread-safe: one thread runs it.
    """

    def __init__(self, config: WorkerConfig, spec: ModelSpec, device: torch.device, layout: Layout, rank: int):
        self.config = config
        self.spec = spec
        self.device = device
        self.layout = layout
        self.rank = rank
        self.shards = rank_shards(layout, spec, rank)
        self.place = ReplicaPlace.of(layout, rank, lockstep=spec.is_moe)
        self.num_replicas = layout.num_replicas if spec.is_moe else layout.attention_data_parallel_size
        self._model: Decoder | None = None
        self._cache: KVCache | None = None
        self._batch: BatchTable | None = None
        self._pipeline: Pipeline | None = None
        self._dtype = torch.float32
        self.expert_load = torch.zeros(0, 0, dtype=torch.int64, device=device)

    # ---------------------------------------------------------------------------------------------------------- start

    def load(self, placement: I32, progress: Callable[[int, int], None] | None = None) -> int:
        """Load what this rank holds of the model; ``placement`` int32 (MoE layers, slots), (0, 0) for a dense one.

        Returns the bytes that were read. ``progress(done, total)`` is called in bytes. Raises InvalidConfig.
        """
        index = CheckpointIndex.open(self.config.model)
        self._dtype = resolve_dtype(self.config.dtype, index)
        maps = PlacementMaps.build(placement, self.spec.num_experts, self.layout.ep_size)
        if len(maps.physical_to_logical) != len(self.spec.moe_layers):
            found = f"{len(maps.physical_to_logical)} layers"
            raise InvalidConfig("placement", found, f"{len(self.spec.moe_layers)}, one per MoE layer of the model")
        length = self.config.max_model_len
        model = Decoder(ModelBuild(self.spec, self.layout, self.rank, maps, length, self._dtype, self.device))
        num_bytes = load_weights(model.plan, index, progress)
        model.finish_loading()
        slots = len(maps.local_slots(self.shards.ep_rank))
        self.expert_load = torch.zeros(len(model.moe_layers), slots, dtype=torch.int64, device=self.device)
        for layer, load in zip(model.moe_layers, self.expert_load, strict=True):
            layer.experts.load = load
        self._model = model
        return num_bytes

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

    def meet(self, groups: StepGroups) -> None:
        """Compute with the ranks of ``groups`` from the next step on."""
        model = self.model
        model.groups.tp, model.groups.attn_tp, model.groups.experts = groups.tp, groups.attn_tp, groups.experts
        model.set_exchange(groups.exchange)
        self._pipeline = groups.pipeline

    def part(self) -> None:
        """The epoch is over: its groups and the buffers given to them are never used again."""
        self.model.leave_groups()
        self._pipeline = None

    def reset(self) -> None:
        """Forget all rows. Cached keys and values stay: rows that are admitted again may name their blocks."""
        self.batch.reset()

    def close(self) -> None:
        """Drop weights and cache."""
        self._model = self._cache = self._batch = None

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

    @torch.inference_mode()
    def execute(self, step: Step) -> StepOutput:
        """Run one step.

        Raises ProtocolError, before any collective, when the step does not fit the table or its own header, and
        NumericFault when the model's output is not finite. After either the table is stale until :meth:`reset`.
        """
        plan = self.batch.apply(step)
        counts = self._check_header(step, plan)
        tokens = StepTokens.of(counts, self.place)
        if not plan.num_tokens:
            if sum(counts):
                self.model.dummy_step(tokens)
            return _EMPTY
        hidden = self._forward(plan, tokens, step.lane)
        pipeline, samples = self._pipeline, len(plan.sampling) > 0
        if pipeline is not None and not pipeline.is_last:
            pipeline.send_hidden(hidden)
            if pipeline.is_first and samples:
                pipeline.expect_tokens(step.lane, plan.sampling_rows)
        elif samples:
            return self._sample(plan, hidden)
        self.batch.advance(plan, None)
        return _EMPTY

    def _check_header(self, step: Step, plan: StepRows) -> list[int]:
        """The token counts of all replicas, once they agree with the table."""
        counts: list[int] = step.num_tokens_across_dp.tolist()
        replica, stages = self.place.replica, self.layout.pipeline_parallel_size
        if len(counts) != self.num_replicas or min(counts) < 0:
            raise ProtocolError(
                f"step {step.step} has token counts {counts} for {self.num_replicas} replicas, "
                f"of which this is {replica}"
            )
        if not 0 <= step.lane < stages:
            raise ProtocolError(f"step {step.step} is of lane {step.lane}; valid: 0 to {stages - 1}")
        if counts[replica] != plan.num_tokens:
            raise ProtocolError(
                f"step {step.step} says {counts[replica]} tokens for replica {replica}, its rows make {plan.num_tokens}"
            )
        if plan.num_tokens > self.config.max_num_batched_tokens:
            raise ProtocolError(
                f"step {step.step} has {plan.num_tokens} tokens; valid: 0 to {self.config.max_num_batched_tokens}"
            )
        return counts

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
        output = _EMPTY
        if logits is not None:
            tokens, output = self._sample_from(logits, plan)
        else:
            tokens = torch.empty(len(plan.sampling), dtype=torch.int64, device=self.device)
        if group.world_size > 1:
            tokens = group.broadcast(tokens, group.ranks[0])
        if self._pipeline is not None:
            self._pipeline.send_tokens(tokens)
        batch.advance(plan, tokens)
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
