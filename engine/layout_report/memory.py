"""What the memory of a GPU leaves for the KV cache, and numbers in words."""

from __future__ import annotations

import msgspec

from drumline.engine.layout_report.question import Question
from drumline.engine.layout_report.ranks import RankReport

_GIB = 1 << 30
_MIB = 1 << 20


def with_memory(question: Question, ranks: tuple[RankReport, ...]) -> tuple[RankReport, ...]:
    """The reports with what one GPU leaves for KV: memory * utilization - weights - staging buffers, in
    tokens by the bytes of one.

    Activations and workspace come out of it too; how much they take depends on the step. Unchanged while the memory of
    a GPU is not known.
    """
    usable = question.usable_memory
    if usable is None:
        return ranks
    filled = []
    for one in ranks:
        free = usable - one.total_weight_bytes - one.staging_bytes
        tokens = max(free, 0) // one.kv_bytes_per_token
        fits = tokens >= question.max_model_len
        filled.append(msgspec.structs.replace(one, kv_bytes_free=free, kv_tokens=tokens, fits=fits))
    return tuple(filled)


def in_bytes(number: int) -> str:
    """ "1.5 GiB", "12.0 MiB", "640 B"."""
    if abs(number) >= _GIB:
        return f"{number / _GIB:,.1f} GiB"
    if abs(number) >= _MIB:
        return f"{number / _MIB:,.1f} MiB"
    return f"{number:,} B"


def in_parameters(number: int) -> str:
    """ "671.0 B" is 671 billion."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return str(number)


def inclusive(span: tuple[int, int]) -> str:
    """The members of a half open range as people write it: (0, 15) is "0-14", (3, 4) is "3", an empty one "-"."""
    first, end = span
    if end <= first:
        return "-"
    return str(first) if end == first + 1 else f"{first}-{end - 1}"


def counted(number: int, thing: str, things: str = "") -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def listed(ids: tuple[int, ...]) -> str:
    """Ascending numbers with runs drawn together: "0-3, 8, 10-12"; steps of more than 1 as "0, 4, ..., 252"."""
    if not ids:
        return "-"
    runs: list[list[int]] = []
    for one in ids:
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    if len(runs) > 4:
        return f"{ids[0]}, {ids[1]}, ... {ids[-1]}"
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
