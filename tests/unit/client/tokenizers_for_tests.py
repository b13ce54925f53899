"""Small real tokenizers."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import drumline.engine.config

DEMO_FOLDER = Path(drumline.engine.config.__file__).parent / "demo"


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))


def byte_tokenizer() -> Tokenizer:
    """Token b stands for byte b; id 256 is a special token. Decodes as byte-level BPE does."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
