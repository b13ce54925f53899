"""How a request is made of what a client submitted: its seed, its stop ids, its limits, its replica, its handles."""

from __future__ import annotations

import msgspec
import numpy as np

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.dispatch import Dispatch
from drumline.engine.core.prefix_cache import PrefixHasher
from drumline.engine.core.request import Request, Sequence
from drumline.protocol.messages import Submit


class Intake:
    """``random`` draws the seeds of requests without one. Stream handles are numbers that are never used again, nor are
    those that :meth:`skip_handles` has been told of."""

    def __init__(
        self, config: CoreConfig, dispatch: Dispatch, hasher: PrefixHasher | None, random: np.random.Generator
    ) -> None:
        self._config = config
        self._dispatch = dispatch
        self._hasher = hasher
        self._random = random
        self._arrivals = 0
        self._streams = 0

    def make(self, connection: int, msg: Submit, longest_text: int = 0) -> Request:
        """The request with ``n`` sequences, which wait nowhere yet, on the replica that the router chose.

        ``longest_text``: tokens that the longest of its sequences has already, prompt included, 0 for a new request.
        One that has some goes to a replica that does not cut it short, if there is any. At least one replica that the
        request asks for must fit its prompt.
        """
        config, dispatch = self._config, self._dispatch
        prompt = np.ascontiguousarray(msg.prompt)
        states = None if self._hasher is None else self._hasher.states(prompt)
        length = len(prompt)
        if longest_text:
            whole = min(length + msg.max_tokens, config.max_model_len, int(dispatch.kv_tokens.max()) + 1)
            length = max(longest_text, whole) - 1
        replica = dispatch.choose(msg, states, length)
        seed = msg.sampling.seed if msg.seed_given else int(self._random.integers(0, 2**63 - 1))
        stops = dict.fromkeys(msg.sampling.stop_token_ids)
        if not msg.ignore_eos:
            stops |= dict.fromkeys(config.eos_token_ids)
        drawn = msgspec.structs.replace(msg.sampling, seed=seed)
        group, place = divmod(replica, config.replicas_per_group)
        request = Request(
            submit=msgspec.structs.replace(msg, prompt=prompt, sampling=drawn, seed_given=True),
            connection=connection,
            sampling=msgspec.structs.replace(drawn, stop_token_ids=tuple(stops)),
            prompt=prompt,
            group=group,
            prefix=states,
            unended=msg.n,
        )
        # The last token needs no KV entry: a sequence alone in the pool may reach one token more than the blocks hold.
        longest = min(len(prompt) + msg.max_tokens, config.max_model_len, int(dispatch.kv_tokens[replica]) + 1)
        for index in range(msg.n):
            sequence = Sequence(request, index, self.next_handle(), self._arrivals, place, prompt, longest)
            self._arrivals += 1
            request.sequences.append(sequence)
        return request

    def next_handle(self) -> int:
        """A stream handle that has not been used before."""
        self._streams += 1
        return self._streams

    def skip_handles(self, used: int) -> None:
        """Handles up to ``used`` have been given out before."""
        self._streams = max(self._streams, used)
