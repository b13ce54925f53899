"""Train the demo model: `python -m tools.train_demo --minutes 40`.

One CPU thread, a fixed wall time, text that ships with Python. The learning rate follows the clock, so that a slow
machine ends its schedule too, with fewer steps; with `--steps N` it follows the step number instead, and the same seed
on the same machine gives the same weights. Checkpoints replace the files of the output folder one by one, each
atomically, from the first `--save-every` seconds on.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from tools.demo_corpus import END_OF_TEXT, Corpus, TokenStream, build_corpus, encode, train_tokenizer
from tools.demo_model import DemoConfig, DemoModel
from tools.demo_optimizer import DemoOptimizer

TOKENS_PER_STEP = 2048
BALANCE_WEIGHT = 0.012  # at 0.003 a tenth of the experts falls asleep
PEAK_RATE, WARMUP, FINAL_SHARE = 4e-3, 0.02, 0.02
ADAM_SHARE = 0.75  # AdamW's rate over Muon's
LENGTHS = ((0.6, 256), (0.9, 512), (1.0, 1024))  # sequences of this length until this progress: attention is dear


@dataclass
class Clock:
    """How far training has come, from 0 to 1: by the wall, or by the step number where that is given."""

    seconds: float
    steps: int | None
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def progress(self, step: int) -> float:
        return min(1.0, step / self.steps if self.steps else self.elapsed() / self.seconds)


def learning_rate(progress: float) -> float:
    if progress < WARMUP:
        return PEAK_RATE * max(progress, 0.0005) / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
    return PEAK_RATE * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def replace(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def save_checkpoint(folder: Path, model: DemoModel, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    described = {
        "config.json": model.config.to_hugging_face(end),
        "generation_config.json": {"do_sample": True, "eos_token_id": end, "pad_token_id": end, "temperature": 0.7},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        },
    }
    replace(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    for name, content in described.items():
        replace(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    replace(folder / "model.safetensors", save(model.hugging_face_tensors(), metadata={"format": "pt"}))


@torch.no_grad()
def held_out_loss(model: DemoModel, documents: list[np.ndarray], length: int = 512, limit: int = 64) -> float:
    """Mean nats per token over up to `limit` sequences of the held-out documents, the same ones each time."""
    tokens = np.concatenate(documents)
    count = min(limit, (len(tokens) - 1) // (length + 1))
    rows = torch.from_numpy(tokens[: count * (length + 1)].reshape(count, length + 1))
    losses = []
    for chunk in torch.split(rows, 4):
        logits, _ = model(chunk[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


def next_batch(prose: TokenStream, code: TokenStream, progress: float) -> Tensor:
    """As many sequences of prose as of code: experts may specialise while the batch as a whole stays balanced."""
    length = next(length for until, length in LENGTHS if progress < until)
    half = TOKENS_PER_STEP // length // 2
    return torch.from_numpy(np.concatenate([prose.take(half, length), code.take(half, length)]))


def train_step(model: DemoModel, optimizer: DemoOptimizer, batch: Tensor, rate: float) -> tuple[float, float]:
    logits, balance = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    (loss + BALANCE_WEIGHT * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(rate)
    return loss.item(), balance.item()


def train(options: argparse.Namespace, corpus: Corpus, report: Callable[[float, str], None]) -> None:
    tokenizer = train_tokenizer(corpus, DemoConfig().vocab_size)
    prose = TokenStream(encode(tokenizer, corpus.prose), options.seed)
    code = TokenStream(encode(tokenizer, corpus.code), options.seed + 1)
    held_out = {"prose": encode(tokenizer, corpus.held_out_prose), "code": encode(tokenizer, corpus.held_out_code)}
    sizes = {"prose": sum(map(len, prose.documents)), "code": sum(map(len, code.documents))}
    model = DemoModel(DemoConfig(vocab_size=tokenizer.get_vocab_size()))
    optimizer = DemoOptimizer(model, ADAM_SHARE)
    parameters = sum(p.numel() for p in model.parameters())
    report(0.0, f"{parameters:,} parameters; tokens to learn from: {sizes['prose']:,} prose, {sizes['code']:,} code")
    clock = Clock(options.minutes * 60, options.steps)
    step, smooth, saved, told = 0, math.log(model.config.vocab_size), 0.0, 0.0
    while (progress := clock.progress(step)) < 1.0:
        loss, balance = train_step(model, optimizer, next_batch(prose, code, progress), learning_rate(progress))
        step += 1
        smooth += (loss - smooth) * 0.05
        if clock.elapsed() - told > options.report_every:
            told = clock.elapsed()
            speed = step * TOKENS_PER_STEP / told
            report(progress, f"step {step} loss {smooth:.3f} balance {balance:.3f} {speed:,.0f} tok/s {told:.0f} s")
        if clock.elapsed() - saved > options.save_every:
            saved = clock.elapsed()
            save_checkpoint(options.out, model, tokenizer)
    save_checkpoint(options.out, model, tokenizer)
    report(1.0, f"{step} steps, {step * TOKENS_PER_STEP:,} tokens, {clock.elapsed():.0f} s, training loss {smooth:.3f}")
    report(1.0, f"passes: prose {prose.passes}, code {code.passes}")
    for kind, documents in held_out.items():
        report(1.0, f"held-out {kind}: {held_out_loss(model, documents):.3f} nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model on the text that ships with Python.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "engine" / "demo")
    parser.add_argument("--minutes", type=float, default=40.0, help="wall time of the training itself")
    parser.add_argument("--steps", type=int, help="train this many steps, whatever the clock says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--report-every", type=float, default=20.0, metavar="SECONDS")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    console = Console()
    if not console.is_terminal:
        train(options, build_corpus(), lambda progress, text: print(f"{progress:6.1%}  {text}", flush=True))
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("reading the standard library", total=1.0)
        train(options, build_corpus(), lambda at, text: bar.update(task, completed=at, description=text))


if __name__ == "__main__":
    main()
