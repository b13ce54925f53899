"""The numbers that the core works by."""

from __future__ import annotations

import msgspec

from drumline.protocol.errors import InvalidConfig

_COUNTS = (
    "max_num_seqs",
    "block_size",
    "vocab_size",
    "data_parallel_size",
    "max_waiting",
    "pipeline_parallel_size",
    "attention_data_parallel_size",
    "attention_tensor_parallel_size",
)


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What scheduling depends on. Limits are per attention replica; lengths are in tokens.

    ``data_parallel_size`` engine replicas have ``attention_data_parallel_size`` attention replicas each, numbered
    ``dp_rank * attention_data_parallel_size + attn_rank``; wherever the core says replica it means those. The heads of
    one are sharded over ``attention_tensor_parallel_size`` ranks. ``lockstep``: all replicas form one lockstep group (a
    MoE model); else those of each engine replica do (dense). ``pipeline_parallel_size``: stages, and so lanes of rows.
    ``max_waiting`` bounds the sequences that wait for a row, over all replicas. ``resume_window_s``: how long a request
    without a reader is kept. ``prefix_affinity`` lets the router
    prefer the replica that holds most of a prompt in its prefix cache.

    Raises :class:`InvalidConfig`, naming the field.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    data_parallel_size: int = 1
    lockstep: bool = False
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = True
    max_waiting: int = 8192
    resume_window_s: float = 60.0
    prefix_affinity: bool = False
    pipeline_parallel_size: int = 1
    attention_data_parallel_size: int = 1
    attention_tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value < 1:
                raise InvalidConfig(name, value, "1 or more")
        if self.max_model_len < 2:
            raise InvalidConfig("max_model_len", self.max_model_len, "2 or more: a prompt token and a generated one")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidConfig(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"{self.max_num_seqs} (max_num_seqs) or more: every running sequence computes a token in each step",
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise InvalidConfig(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"{self.max_model_len} (max_model_len) or more while enable_chunked_prefill is off",
            )
        if not self.resume_window_s >= 0.0:
            raise InvalidConfig("resume_window_s", self.resume_window_s, "0 or more")
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidConfig("eos_token_ids", token, f"0 to {self.vocab_size - 1}")

    @property
    def steps_in_flight(self) -> int:
        """How many steps may be sent and not yet acknowledged by every replica of the group: one per stage, and with
        ``async_scheduling`` one more that waits for the first stage."""
        return self.pipeline_parallel_size + int(self.async_scheduling)

    @property
    def num_replicas(self) -> int:
        """Attention replicas of all engine replicas."""
        return self.data_parallel_size * self.attention_data_parallel_size

    @property
    def replicas_per_group(self) -> int:
        """Attention replicas of one lockstep group."""
        return self.num_replicas if self.lockstep else self.attention_data_parallel_size

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that leaves room for one generated token in the context."""
        return self.max_model_len - 1
