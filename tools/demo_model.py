"""A small Qwen3-MoE in plain torch, made for training on one CPU thread.

It computes what transformers' `Qwen3MoeForCausalLM` computes (tests/parity hold the shipped checkpoint to that) but
keeps each layer's experts in two tensors and gives every expert its tokens as one contiguous slice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def to_hugging_face(self, end_of_text: int) -> dict[str, Any]:
        """config.json in the key style that both older and newer readers of Qwen3-MoE folders understand."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "decoder_sparse_step": 1,
            "eos_token_id": end_of_text,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": True,
            "num_attention_heads": self.num_attention_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "output_router_logits": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


class Permute(torch.autograd.Function):
    """Rows by a permutation. Its gradient is a gather by the inverse, much faster than the scatter torch would use."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


permute: Callable[[Tensor, Tensor, Tensor], Tensor] = Permute.apply


def weight(*shape: int, scale: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * scale)


class Experts(nn.Module):
    """Top-k of num_experts SwiGLU networks. Call it on (tokens, hidden); it gives the output and the balancing loss."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.count, self.top_k = config.num_experts, config.num_experts_per_tok
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.router = weight(self.count, hidden)
        self.gate_up = weight(self.count, 2 * width, hidden)
        self.down = weight(self.count, hidden, width, scale=0.02 / (2 * config.num_hidden_layers) ** 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probs = F.linear(x, self.router).softmax(-1)
        top, chosen = probs.topk(self.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        inverse = order.argsort()
        counts = torch.bincount(chosen.flatten(), minlength=self.count)
        copies = x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, x.shape[-1])
        slices = torch.split(permute(copies, order, inverse), counts.tolist())
        each = zip(slices, self.gate_up.unbind(), self.down.unbind(), strict=True)
        outputs = [expert(rows, gate_up, down) for rows, gate_up, down in each]
        y = permute(torch.cat(outputs), inverse, order).view(len(x), self.top_k, -1)
        share = counts / (len(x) * self.top_k)
        return torch.bmm(top.unsqueeze(1), y).squeeze(1), self.count * (share * probs.mean(0)).sum()


def expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class Layer(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        c, self.config = config, config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.input_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
        self.q, self.k = weight(queries, c.hidden_size), weight(keys, c.hidden_size)
        self.v = weight(keys, c.hidden_size)
        self.o = weight(c.hidden_size, queries, scale=0.02 / (2 * c.num_hidden_layers) ** 0.5)
        self.experts = Experts(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.input_norm(x), cos, sin)
        y, balance = self.experts(self.post_norm(x).flatten(0, 1))
        return x + y.view_as(x), balance

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(F.linear(x, self.q).view(batch, length, -1, self.config.head_dim))
        k = self.k_norm(F.linear(x, self.k).view(batch, length, -1, self.config.head_dim))
        v = F.linear(x, self.v).view(batch, length, -1, self.config.head_dim)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(2), self.o)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (batch, length, heads, head_dim), first half against second half of each head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class DemoModel(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        self.register_buffer("cos", angles.cos().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().unsqueeze(1), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length) token ids -> (batch, length, vocab) logits, and the layers' mean balancing loss."""
        length = tokens.shape[1]
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        balance = x.new_zeros(())
        for layer in self.layers:
            x, loss = layer(x, cos, sin)
            balance = balance + loss / len(self.layers)
        return F.linear(self.norm(x), self.embedding), balance

    def hugging_face_tensors(self) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name, the experts one by one."""
        tensors: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            at = f"model.layers.{i}"
            tensors[f"{at}.input_layernorm.weight"] = layer.input_norm.weight
            tensors[f"{at}.post_attention_layernorm.weight"] = layer.post_norm.weight
            tensors[f"{at}.self_attn.q_norm.weight"] = layer.q_norm.weight
            tensors[f"{at}.self_attn.k_norm.weight"] = layer.k_norm.weight
            for name in "qkvo":
                tensors[f"{at}.self_attn.{name}_proj.weight"] = getattr(layer, name)
            tensors[f"{at}.mlp.gate.weight"] = layer.experts.router
            for e in range(self.config.num_experts):
                gate, up = layer.experts.gate_up[e].chunk(2)
                tensors[f"{at}.mlp.experts.{e}.gate_proj.weight"] = gate
                tensors[f"{at}.mlp.experts.{e}.up_proj.weight"] = up
                tensors[f"{at}.mlp.experts.{e}.down_proj.weight"] = layer.experts.down[e]
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
