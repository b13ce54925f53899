"""The text the demo model learns from: what every Python installation carries with it.

Two kinds of document are kept apart, so that a batch can mix them evenly and so that their expert loads can be told
apart later: *prose* (the language reference in `pydoc_data.topics`, and the docstrings of the standard library) and
*code* (the source files of the standard library).
"""

import ast
import builtins
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PERCENT = 4
TOPIC_REPEATS = 2  # the reference is the best prose of the corpus and a tenth of it
SKIPPED_TESTS = {"test", "tests", "idle_test", "turtledemo"}
SKIPPED_FOLDERS = SKIPPED_TESTS | {"site-packages", "dist-packages", "encodings", "pydoc_data"}

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Documents by kind; the held-out ones are never trained on, as prose or as code."""

    prose: list[str]
    code: list[str]
    held_out_prose: list[str]
    held_out_code: list[str]


def build_corpus() -> Corpus:
    corpus = Corpus([], [], [], [])
    for name in sorted(topics):
        if is_held_out(name):
            corpus.held_out_prose.append(topics[name].strip())
        else:
            corpus.prose.extend([topics[name].strip()] * TOPIC_REPEATS)
    for name, kind in sorted(vars(builtins).items()):
        if isinstance(kind, type) and (text := class_document(name, kind)):
            corpus.prose.append(text)
    for name, source in standard_library():
        held_out = is_held_out(name)
        (corpus.held_out_code if held_out else corpus.code).append(source.strip())
        text = "\n\n".join(docstrings(name, source))
        if len(text) > 200:
            (corpus.held_out_prose if held_out else corpus.prose).append(text)
    return corpus


def is_held_out(name: str) -> bool:
    """The same answer on every machine: a document is drawn by the hash of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def standard_library() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the modules under the standard library's folder, in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            try:
                source = path.read_text(encoding="utf-8")
                ast.parse(source)
            except (UnicodeDecodeError, SyntaxError):
                continue  # templates of lib2to3, a few latin-1 files
            yield ".".join(parts)[: -len(".py")].removesuffix(".__init__"), source


def docstrings(name: str, source: str) -> Iterator[str]:
    """The module's docstring under its name, then that of each public class and function under its signature."""
    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield f"{name}\n\n{text.strip()}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (text := ast.get_docstring(node)) and len(text) > 60:
            head = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"
            yield f"{head}\n\n{text.strip()}"


def class_document(name: str, kind: type) -> str:
    parts = [f"class {name}\n\n{inspect.getdoc(kind) or ''}"]
    for member, value in sorted(vars(kind).items()):
        if not member.startswith("_") and (text := inspect.getdoc(value)):
            parts.append(f"{name}.{member}\n\n{text}")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE; prose weighs more than its share of the bytes, since prose is what the demo shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus.prose, *corpus.prose, *corpus.code[::3]], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[Tokens]:
    """Each document's token ids, closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([*found.ids, end], dtype=np.int64) for found in tokenizer.encode_batch(documents)]


class TokenStream:
    """Endless passes over the documents. Each pass joins them in a new order, cuts sequences and shuffles those too, or
    a long document would fill many steps in a row."""

    def __init__(self, documents: list[Tokens], seed: int) -> None:
        self.documents = documents
        self.random = np.random.default_rng(seed)
        self.passes = 0
        self.rows: Tokens = np.empty((0, 0), dtype=np.int64)

    def take(self, sequences: int, length: int) -> Tokens:
        """(sequences, length + 1) token ids: the inputs and, one to the right, the targets."""
        if len(self.rows) < sequences or self.rows.shape[1] != length + 1:
            self.rows = self.new_pass(length + 1)
        taken, self.rows = self.rows[:sequences], self.rows[sequences:]
        return taken

    def new_pass(self, length: int) -> Tokens:
        self.passes += 1
        tokens = np.concatenate([self.documents[i] for i in self.random.permutation(len(self.documents))])
        start = self.random.integers(length)
        count = (len(tokens) - start) // length
        rows: Tokens = tokens[start : start + count * length].reshape(count, length)
        shuffled: Tokens = rows[self.random.permutation(count)]
        return shuffled
