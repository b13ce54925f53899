"""How prose and code load the demo model's experts: `python -m tools.expert_load`, as Markdown tables.

The texts are the documents that training held out. A share is the part of all (token, choice) pairs of a layer that
went to an expert, so an even load of 16 experts is 6.2 % each.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM

from tools.demo_corpus import build_corpus

Shares = npt.NDArray[np.float64]


def expert_shares(model: Qwen3MoeForCausalLM, prompts: list[list[int]]) -> Shares:
    """(layers, experts) shares of the routed tokens of all prompts; each row sums to 1."""
    config = model.config
    counts = np.zeros((config.num_hidden_layers, config.num_experts), dtype=np.int64)
    for prompt in prompts:
        with torch.no_grad():
            routed = model(torch.tensor([prompt]), output_router_logits=True).router_logits
        for layer, logits in enumerate(routed):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts).numpy()
    shares: Shares = counts / counts.sum(axis=1, keepdims=True)
    return shares


def table(shares: Shares) -> str:
    experts = range(shares.shape[1])
    lines = ["| layer | " + " | ".join(str(e) for e in experts) + " |", "|---" * (len(experts) + 1) + "|"]
    lines += [f"| {i} | " + " | ".join(f"{100 * s:.1f}" for s in row) + " |" for i, row in enumerate(shares)]
    return "\n".join(lines)


def differences(prose: Shares, code: Shares) -> str:
    """Per layer: what part of the load moves when prose turns to code, and how uneven each is (max over mean)."""
    lines = ["| layer | load that moves | hottest expert, prose | hottest expert, code |", "|---|---|---|---|"]
    for layer, (a, b) in enumerate(zip(prose, code, strict=True)):
        hot = [f"{row.argmax()}, {row.max() * len(row):.2f} x the mean" for row in (a, b)]
        lines.append(f"| {layer} | {50 * np.abs(a - b).sum():.0f} % | {hot[0]} | {hot[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the expert loads of prose and of code prompts.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "engine" / "demo")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    options = parser.parse_args()
    model = Qwen3MoeForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    corpus = build_corpus()
    shares = {}
    for kind, documents in (("prose", corpus.held_out_prose), ("code", corpus.held_out_code)):
        ids = [i for encoded in tokenizer.encode_batch(documents) for i in encoded.ids]
        starts = np.linspace(0, len(ids) - options.length, options.prompts).astype(int)
        shares[kind] = expert_shares(model, [ids[start : start + options.length] for start in starts])
        title = f"{kind.capitalize()}: {options.prompts} prompts of {options.length} tokens, percent per expert"
        print(f"{title}\n\n{table(shares[kind])}\n")
    print(f"Prose against code\n\n{differences(shares['prose'], shares['code'])}")


if __name__ == "__main__":
    main()
