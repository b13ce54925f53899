"""Which full blocks hold which prefix.

The key of a block is a hash of the whole prefix up to its end: the multilinear hash ``sum((token + 1) *
weight[position]) mod 2**64 >> 32`` over random 64-bit weights, four times over for 128 bits (Lemire and Kaser,
"Strongly universal string hashing is fast", The Computer Journal 57(11), 2014). For two different prefixes the keys are
equal with probability 2**-128 whatever an adversary chose, as long as the weights are secret; they are drawn anew by
every process. Because it is a sum over positions, a prompt of any length is hashed with one cumulative sum, and the
next block of a thousand rows with one product. A hit is taken only if the tokens in the block agree as well.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from drumline.engine.core.block_pool import I64, BlockPool

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
LANES = 4


class PrefixHasher:
    """Hash states (uint64, 4 lanes) and keys (uint32, 4 lanes) of prefixes that are whole blocks."""

    def __init__(self, block_size: int, max_tokens: int, entropy: np.random.Generator | None = None) -> None:
        generator = entropy if entropy is not None else np.random.default_rng()
        self.block_size = block_size
        blocks = -(-max_tokens // block_size)
        top = np.iinfo(np.uint64).max
        self._weights = generator.integers(0, top, (blocks, block_size, LANES), dtype=np.uint64, endpoint=True)
        self._offset = generator.integers(0, top, LANES, dtype=np.uint64, endpoint=True)

    def states(self, tokens: npt.NDArray[np.int32]) -> U64:
        """uint64 (full blocks, 4): the state after each full block of ``tokens``."""
        blocks = len(tokens) // self.block_size
        words = tokens[: blocks * self.block_size].astype(np.uint64).reshape(blocks, self.block_size, 1) + np.uint64(1)
        sums: U64 = np.cumsum((words * self._weights[:blocks]).sum(axis=1, dtype=np.uint64), axis=0, dtype=np.uint64)
        return sums

    def block_sums(self, tokens: npt.NDArray[np.int32], index: I64) -> U64:
        """uint64 (n, 4): what block ``index[i]`` with ``tokens[i]`` (int32 (n, block_size)) adds to its row's state."""
        words = tokens.astype(np.uint64)[:, :, None] + np.uint64(1)
        sums: U64 = (words * self._weights[index]).sum(axis=1, dtype=np.uint64)
        return sums

    def keys(self, states: U64) -> U32:
        """uint32 (n, 4)."""
        return ((states + self._offset) >> np.uint64(32)).astype(np.uint32)


class PrefixCache:
    """The index from key to block, one per replica, and its statistics.

    A block that the pool gives away for new content stays in the index until :meth:`purge`; a look-up believes only the
    key that stands at the block itself. So giving blocks away costs no work per block on the critical path.
    """

    def __init__(self, pool: BlockPool, history: npt.NDArray[np.int32], hasher: PrefixHasher) -> None:
        self.hasher = hasher
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._pool = pool
        self._history = history
        self._index: list[dict[bytes, int]] = [{} for _ in pool.num_blocks]

    def __len__(self) -> int:
        return sum(len(index) for index in self._index)

    def lookup(self, replica: int, tokens: npt.NDArray[np.int32], states: U64) -> I64:
        """int64 (hits,): the blocks that hold the longest cached prefix of ``tokens`` made of whole blocks.

        ``states``: those of the blocks to look at, so at most ``len(tokens) // block_size``.
        """
        count = len(states)
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        index = self._index[replica]
        keys = self.hasher.keys(states)
        found: list[int] = []
        for key in _as_bytes(keys):
            block = index.get(key)
            if block is None:
                break
            found.append(block)
        blocks = np.asarray(found, dtype=np.int64)
        wanted = tokens[: len(found) * self.hasher.block_size].reshape(len(found), self.hasher.block_size)
        good = self._holds(blocks, keys[: len(found)]) & (self._history[blocks] == wanted).all(axis=1)
        wrong = np.flatnonzero(~good)
        return blocks[: wrong[0]] if len(wrong) else blocks

    def insert(self, replica: int, blocks: I64, states: U64) -> None:
        """Full blocks, in use by some row, whose content has been computed. A prefix that is cached already stays where
        it is."""
        index = self._index[replica]
        keys = self.hasher.keys(states)
        names = _as_bytes(keys)
        present = np.asarray([index.get(name, 0) for name in names], dtype=np.int64)
        fresh = ~self._holds(present, keys) & ~self._pool.keyed[blocks]
        entered: set[bytes] = set()
        for i in np.flatnonzero(fresh).tolist():
            if names[i] in entered:  # two rows filled the same prefix in one step; one copy is enough
                fresh[i] = False
                continue
            entered.add(names[i])
            index[names[i]] = int(blocks[i])
        new = blocks[fresh]
        self._pool.keyed[new] = True
        self._pool.keys[new] = keys[fresh]

    def purge(self) -> None:
        """Takes out of the index what the pool has given away."""
        for replica, blocks, keys in self._pool.lost:
            index = self._index[replica]
            gone = ~self._holds(blocks, keys)
            for block, name, is_gone in zip(blocks.tolist(), _as_bytes(keys), gone.tolist(), strict=True):
                if is_gone and index.get(name) == block:
                    del index[name]
        self._pool.lost.clear()

    def forget(self, replica: int) -> None:
        """The replica's blocks hold nothing any more."""
        self._pool.forget_cached(replica)
        self._index[replica].clear()

    def _holds(self, blocks: I64, keys: U32) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self._pool.keyed[blocks] & (self._pool.keys[blocks] == keys).all(axis=1)
        return held


def _as_bytes(keys: U32) -> list[bytes]:
    names: list[bytes] = np.ascontiguousarray(keys).view("V16").ravel().tolist()
    return names
