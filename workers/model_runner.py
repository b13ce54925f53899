"""One rank's model: applies steps to the batch table, computes them and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.checkpoint import CheckpointIndex
from drumline.protocol.errors import DrumlineError, ErrorInfo, InvalidConfig, ProtocolError
from drumline.protocol.messages import I32, LogprobEntry, Step, WorkerConfig
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps
from drumline.workers.attention_plan import plan_attention
from drumline.workers.batch import BatchTable, StepRows
from drumline.workers.kv_cache import KVCache, block_bytes, choose_num_blocks
from drumline.workers.layers import ExpertExchange
from drumline.workers.loading import load_weights, resolve_dtype
from drumline.workers.models import Decoder, ModelPlacement, StepContext, build_model
from drumline.workers.sampler import sample

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
    """The model, the KV cache and the batch table of one rank.

    Call :meth:`load` once, :meth:`init_kv_cache` once, then :meth:`reset` at each epoch and :meth:`execute` for each
    step. Not thread-safe: one thread runs it. ``ep_rank`` and ``ep_size`` place it among the ranks that hold experts.
    """

    def __init__(self, config: WorkerConfig, spec: ModelSpec, device: torch.device, ep_rank: int, ep_size: int):
        self.config = config
        self.spec = spec
        self.device = device
        self.ep_rank = ep_rank
        self.ep_size = ep_size
        self._model: Decoder | None = None
        self._cache: KVCache | None = None
        self._batch: BatchTable | None = None
        self._dtype = torch.float32
        self.expert_load = torch.zeros(0, 0, dtype=torch.int64, device=device)

    # ---------------------------------------------------------------------------------------------------------- start

    def load(self, placement: I32, progress: Callable[[int, int], None] | None = None) -> int:
        """Load what this rank holds of the model; ``placement`` int32 (MoE layers, slots), (0, 0) for a dense one.

        Returns the bytes that were read. ``progress(done, total)`` is called in bytes. Raises InvalidConfig.
        """
        index = CheckpointIndex.open(self.config.model)
        self._dtype = resolve_dtype(self.config.dtype, index)
        maps = PlacementMaps.build(placement, self.spec.num_experts, self.ep_size)
        if len(maps.physical_to_logical) != len(self.spec.moe_layers):
            found = f"{len(maps.physical_to_logical)} layers"
            raise InvalidConfig("placement", found, f"{len(self.spec.moe_layers)}, one per MoE layer of the model")
        where = ModelPlacement(maps, self.ep_rank, self.config.max_model_len, self._dtype, self.device)
        model = build_model(self.spec, where)
        num_bytes = load_weights(model.plan, index, progress)
        model.finish_loading()
        slots = len(maps.local_slots(self.ep_rank))
        self.expert_load = torch.zeros(len(model.moe_layers), slots, dtype=torch.int64, device=self.device)
        for layer, load in zip(model.moe_layers, self.expert_load, strict=True):
            layer.load = load
        self._model = model
        return num_bytes

    def init_kv_cache(self) -> tuple[int, int]:
        """Allocate the KV cache; returns (blocks, bytes per block). Raises InvalidConfig, saying what would fit."""
        config = self.config
        num_blocks = choose_num_blocks(config, self.spec, self._dtype, self.device)
        self._cache = KVCache(self.spec, num_blocks, config.block_size, self._dtype, self.device)
        self._batch = BatchTable(
            config.max_num_seqs,
            config.max_model_len,
            num_blocks,
            config.block_size,
            self.spec.vocab_size,
            self.device,
        )
        return num_blocks, block_bytes(self.spec, config.block_size, self._dtype)

    def set_exchange(self, exchange: ExpertExchange) -> None:
        """Send tokens to their experts through ``exchange`` from the next step on."""
        self.model.set_exchange(exchange)

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
    def execute(self, step: Step, replica: int) -> StepOutput:
        """Run one step; ``replica`` is this replica's place in ``num_tokens_across_dp``.

        Raises ProtocolError, before any collective, when the step does not fit the table or its own header, and
        NumericFault when the model's output is not finite. After either the table is stale until :meth:`reset`.
        """
        plan = self.batch.apply(step)
        counts = self._check_header(step, replica, plan)
        if not plan.num_tokens:
            if sum(counts):
                self.model.dummy_step(counts)
            return _EMPTY
        hidden = self._forward(plan, counts)
        if not len(plan.sampling):
            self.batch.advance(plan, None)
            return _EMPTY
        return self._sample(plan, hidden)

    def _check_header(self, step: Step, replica: int, plan: StepRows) -> list[int]:
        """The token counts of all replicas, once they agree with the table."""
        counts: list[int] = step.num_tokens_across_dp.tolist()
        if len(counts) != self.ep_size or not 0 <= replica < len(counts) or min(counts) < 0:
            raise ProtocolError(
                f"step {step.step} has token counts {counts} for {self.ep_size} replicas, of which this is {replica}"
            )
        if counts[replica] != plan.num_tokens:
            raise ProtocolError(
                f"step {step.step} says {counts[replica]} tokens for replica {replica}, its rows make {plan.num_tokens}"
            )
        if plan.num_tokens > self.config.max_num_batched_tokens:
            raise ProtocolError(
                f"step {step.step} has {plan.num_tokens} tokens; valid: 0 to {self.config.max_num_batched_tokens}"
            )
        return counts

    def _forward(self, plan: StepRows, counts: Sequence[int]) -> Tensor:
        batch, cache = self.batch, self.cache
        ids = batch.input_ids(plan)
        attention = plan_attention(plan, batch, cache)
        cache.tokens.index_copy_(0, attention.slots, ids.int())
        positions = batch.on_device(plan.positions)
        hidden = self.model.hidden(ids, StepContext(positions, attention, counts, cache.keys, cache.values))
        # One cheap sum sees every NaN and infinity; which token it was is asked only after a fault.
        if not hidden.sum().isfinite():
            tokens = (~hidden.isfinite()).any(-1).nonzero().view(-1).cpu().numpy()
            rows = plan.rows[np.unique(np.searchsorted(plan.ends, tokens, side="right"))]
            raise self._numeric_fault(rows, "hidden states")
        return hidden

    def _sample(self, plan: StepRows, hidden: Tensor) -> StepOutput:
        batch = self.batch
        if not plan.each_token_samples:
            hidden = hidden.index_select(0, batch.on_device(plan.last_tokens))
        logits = self.model.logits(hidden)
        if not logits.sum().isfinite():
            wrong = (~logits.isfinite()).any(-1).nonzero().view(-1).cpu().numpy()
            raise self._numeric_fault(plan.sampling_rows[wrong], "logits")
        rows = batch.sampling_rows(plan)
        penalised = rows.penalised()
        if len(penalised):
            rows.history = batch.history(plan.sampling_rows[penalised], self.cache.tokens)
        sampled = sample(logits, rows)
        batch.advance(plan, sampled.tokens)
        return StepOutput(
            sampled.tokens.cpu().numpy().astype(np.int32), sampled.logprob_rows.astype(np.int32), sampled.logprobs
        )

    def _numeric_fault(self, rows: Sequence[int] | np.ndarray, what: str) -> NumericFault:
        batch = self.batch
        held = [batch.block_table[row, : batch.blocks_held[row]] for row in rows]
        self.cache.scrub(batch.on_device(np.unique(np.concatenate(held))))
        return NumericFault([int(row) for row in rows], what)
