"""Which full blocks hold which prefix.

The key of a block is a hash of the whole prefix up to its end: the multilinear hash ``sum((token + 1) *
weight[position]) mod 2**64 >> 32`` over random 64-bit weights, four times over for 128 bits (Lemire and Kaser,
"Strongly universal string hashing is fast", The Computer Journal 57(11), 2014). For two different prefixes the keys are
equal with probability 2**-128 whatever an adversary chose, as long as the weights are secret; they are drawn anew by
every process. Because it is a sum over positions, a prompt of any length is hashed with one cumulative sum, and the
next block of a thousand rows with one product. A hit is taken only if the tokens in the block agree as well.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from drumline.engine.core.block_pool import I64, BlockPool

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
LANES = 4


class PrefixHasher:
    """Hash states (uint64, 4 lanes) of prefixes that are whole blocks, and what makes keys of them."""

    def __init__(self, block_size: int, max_tokens: int, entropy: np.random.Generator) -> None:
        self._random = entropy
        self.block_size = block_size
        self._weights = self._draw((-(-max_tokens // block_size), LANES, block_size))

    def states(self, tokens: npt.NDArray[np.int32]) -> U64:
        """uint64 (full blocks, 4): the state after each full block of ``tokens``."""
        blocks = len(tokens) // self.block_size
        words = tokens[: blocks * self.block_size].reshape(blocks, self.block_size)
        return np.cumsum(self.block_sums(words, slice(0, blocks)), axis=0, dtype=np.uint64)

    def block_sums(self, tokens: npt.NDArray[np.int32], index: I64 | slice) -> U64:
        """uint64 (n, 4): what block ``index[i]`` with ``tokens[i]`` (int32 (n, block_size)) adds to its row's state."""
        words = tokens.astype(np.uint64) + np.uint64(1)
        sums: U64 = np.einsum("nt,nlt->nl", words, self._weights[index])
        return sums

    def offsets(self, count: int) -> U64:
        """uint64 (count, 4): the constant term of the hash, one for each replica."""
        return self._draw((count, LANES))

    def _draw(self, shape: tuple[int, ...]) -> U64:
        return self._random.integers(0, np.iinfo(np.uint64).max, shape, dtype=np.uint64, endpoint=True)


class PrefixCache:
    """The index from key to block for all replicas of a group, and its statistics. Each replica has a constant of its
    own in the hash, so that the same prefix has another key on each, and one index serves a whole step.

    A block that the pool gives away for new content stays in the index until :meth:`purge`; a look-up believes only the
    key that stands at the block itself. So giving blocks away costs no work per block on the critical path.
    """

    def __init__(self, pool: BlockPool, history: npt.NDArray[np.int32], hasher: PrefixHasher) -> None:
        self.hasher = hasher
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._pool = pool
        self._history = history
        self._offsets = hasher.offsets(len(pool.num_blocks))
        self._index: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def lookup(self, replica: int, tokens: npt.NDArray[np.int32], states: U64) -> I64:
        """int64 (hits,): the replica's blocks that hold the longest cached prefix of ``tokens`` made of whole blocks.

        ``states``: those of the blocks to look at, so at most ``len(tokens) // block_size``.
        """
        if len(states) == 0:
            return np.zeros(0, dtype=np.int64)
        keys = _keys(states + self._offsets[replica])
        found: list[int] = []
        for key in _names(keys):
            block = self._index.get(key)
            if block is None:
                break
            found.append(block)
        blocks = np.asarray(found, dtype=np.int64)
        wanted = tokens[: len(found) * self.hasher.block_size].reshape(len(found), self.hasher.block_size)
        good = self._holds(blocks, keys[: len(found)]) & (self._history[blocks] == wanted).all(axis=1)
        wrong = np.flatnonzero(~good)
        return blocks[: wrong[0]] if len(wrong) else blocks

    def insert(self, replicas: I64, blocks: I64, states: U64) -> None:
        """Full blocks, in use by some row, whose content has been computed; ``replicas[i]`` owns ``blocks[i]``.

        A prefix that is cached already stays where it is.
        """
        keys = _keys(states + self._offsets[replicas])
        names = _names(keys)
        index = self._index
        present = np.asarray([index.get(name, 0) for name in names], dtype=np.int64)
        fresh = ~(self._holds(present, keys) | self._pool.keyed[blocks])
        new = dict(zip(itertools.compress(names, fresh), np.flatnonzero(fresh).tolist(), strict=True))
        # Where two rows filled the same prefix in one step, one copy is enough: the dict has kept one of them.
        kept = np.fromiter(new.values(), dtype=np.int64, count=len(new))
        entered = blocks[kept]
        index.update(zip(new, entered.tolist(), strict=True))
        self._pool.keyed[entered] = True
        self._pool.keys[entered] = keys[kept]

    def purge(self) -> None:
        """Takes out of the index what the pool has given away."""
        lost = self._pool.lost
        if lost:
            self._drop(np.concatenate([blocks for blocks, _ in lost]), np.concatenate([keys for _, keys in lost]))
            lost.clear()

    def forget(self, replica: int) -> None:
        """The replica's blocks hold nothing any more."""
        first, end = self._pool.first[replica], self._pool.first[replica + 1]
        blocks = np.flatnonzero(self._pool.keyed[first:end]) + first
        keys = self._pool.keys[blocks]
        self._pool.forget_cached(replica)
        self._drop(blocks, keys)

    def _drop(self, blocks: I64, keys: U32) -> None:
        gone = ~self._holds(blocks, keys)
        names = itertools.compress(_names(keys), gone)
        for name, block in zip(names, blocks[gone].tolist(), strict=True):
            if self._index.get(name) == block:
                del self._index[name]

    def _holds(self, blocks: I64, keys: U32) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self._pool.keyed[blocks] & (self._pool.keys[blocks] == keys).all(axis=1)
        return held


def _keys(states: U64) -> U32:
    return (states >> np.uint64(32)).astype(np.uint32)


def _names(keys: U32) -> list[bytes]:
    names: list[bytes] = np.ascontiguousarray(keys).view("V16").ravel().tolist()
    return names
