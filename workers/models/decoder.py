"""The decoder that all supported models are variants of: norm, attention, norm, feed-forward, residuals between.

What sets the architectures apart is in the spec: latent attention or heads, norms of heads, biases, experts, gates. A
rank of a pipeline has the layers of its stage, the first stage the embedding, the last one norm and output head.
"""

from __future__ import annotations

from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.workers.layers import (
    ExpertExchange,
    LocalExchange,
    ModelGroups,
    MoeLayer,
    RmsNorm,
    RotaryEmbedding,
    VocabEmbedding,
    VocabHead,
)
from drumline.workers.loading import LoadPlan
from drumline.workers.models.attention import LatentAttention, SelfAttention
from drumline.workers.models.build import ModelBuild
from drumline.workers.models.context import RotaryTables, StepContext
from drumline.workers.models.expert_model import ExpertModel
from drumline.workers.models.feed_forward import feed_forward
from drumline.workers.step_tokens import StepTokens


class DecoderLayer:
    """One layer: attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, build: ModelBuild, layer: int):
        spec, prefix = build.spec, f"model.layers.{layer}"
        self.input_norm = RmsNorm(build.load(f"{prefix}.input_layernorm.weight"), spec.rms_norm_eps)
        self.post_norm = RmsNorm(build.load(f"{prefix}.post_attention_layernorm.weight"), spec.rms_norm_eps)
        self.attention: SelfAttention | LatentAttention = (
            SelfAttention(build, layer) if spec.mla is None else LatentAttention(build, layer, spec.mla)
        )
        self.mlp = feed_forward(build, layer)

    def __call__(
        self, x: Tensor, place: int, rotary: RotaryEmbedding, tables: RotaryTables, step: StepContext
    ) -> Tensor:
        x = x + self.attention(self.input_norm(x), place, rotary, tables, step)
        return x + self.mlp(self.post_norm(x), step.tokens)


class Decoder(ExpertModel):
    """A causal language model, or the stage of one. ``plan`` says which tensor of the checkpoint fills which weight."""

    def __init__(self, build: ModelBuild):
        spec, shards = build.spec, build.shards
        self.spec = spec
        self.shards = shards
        self.groups: ModelGroups = build.groups
        self.dtype, self.device = build.dtype, build.device
        embedding = "model.embed_tokens.weight"
        weight = build.load(embedding) if shards.first_stage else None
        self.embedding = None if weight is None else VocabEmbedding(weight, shards.vocab, self.groups)
        self.layers = [DecoderLayer(build, layer) for layer in range(*shards.layers)]
        self.norm: RmsNorm | None = None
        self.head: VocabHead | None = None
        if shards.last_stage:
            self.norm = RmsNorm(build.load("model.norm.weight"), spec.rms_norm_eps)
            if not spec.tie_word_embeddings:
                weight = build.load("lm_head.weight")
            elif weight is None:
                weight = build.load(embedding)
            self.head = VocabHead(weight, build.vocab_widths, self.groups)
        self.rotary = RotaryEmbedding(
            spec.rotary_dim,
            spec.rope_theta,
            spec.rope_scaling,
            build.max_model_len,
            build.device,
            interleaved=spec.rope_interleaved,
        )
        self.moe_layers = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeLayer)]
        self.plan = build.plan

    def finish_loading(self) -> None:
        """The weights are in place: lay them out for use and let go of the plan's views of them."""
        self.plan = LoadPlan(self.plan.weights)
        for layer in self.layers:
            layer.attention.pack()
            layer.mlp.pack()
        if self.head is not None:
            self.head.pack()

    def set_exchange(self, exchange: ExpertExchange) -> None:
        """Use ``exchange`` in every MoE layer from the next step on."""
        for moe in self.moe_layers:
            moe.exchange = exchange

    def leave_groups(self) -> None:
        """The epoch is over: neither its groups nor its exchange are used again."""
        self.groups.leave()
        self.set_exchange(LocalExchange())

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (n,) to (n, hidden). Raises ProtocolError on a stage without embedding."""
        if self.embedding is None:
            raise ProtocolError("only the first stage embeds tokens")
        return self.embedding(token_ids)

    def hidden(self, x: Tensor, step: StepContext) -> Tensor:
        """(n, hidden) before the stage's layers to the same after them, normalised by the last stage."""
        tables = self.rotary.at(step.positions)
        for place, layer in enumerate(self.layers):
            x = layer(x, place, self.rotary, tables, step)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """(n, hidden) to float32 (n, vocabulary) on the first rank of the attention replica, None on the others. Raises
        ProtocolError on a stage without output head."""
        if self.head is None:
            raise ProtocolError("only the last stage computes logits")
        return self.head(hidden)

    def dummy_step(self, tokens: StepTokens) -> None:
        """Compute no token of this replica, but meet the other replicas wherever they need this rank."""
        nothing = self.layers[0].input_norm.weight.new_empty(0, self.spec.hidden_size)
        for layer in self.layers:
            layer.mlp(nothing, tokens)
