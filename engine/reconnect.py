"""The client's socket to whichever coordinator serves an endpoint at the moment.

The loss of a Dealer is final, so every connection has one of its own. A coordinator of an older term than one that was
seen before is left again: its place is taken.
"""

from __future__ import annotations

import asyncio
import collections
from typing import Any

import zmq

from drumline.protocol.codec import Codec
from drumline.protocol.messages import PROTOCOL_VERSION, FromClient, HelloClient, ToClient, WelcomeClient
from drumline.protocol.sockets import Dealer, SendResult

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class CoordinatorSocket:
    """Made in a running loop. ``term``: the newest that was seen. ``up``: the present coordinator has said welcome.
    ``heard``: it has said anything. ``lost`` is set while a connection that stood has no successor yet."""

    def __init__(self, endpoint: str, client_id: str) -> None:
        self.endpoint = endpoint
        self.term = 0
        self.up = False
        self.heard = False
        self.lost = asyncio.Event()
        self._client_id = client_id
        self._attempts = 0
        self._unsent: collections.deque[FromClient] = collections.deque()
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._dealer: Dealer[ToClient] = Dealer(self._context, endpoint, Codec(ToClient))
        except BaseException:
            self._context.term()
            raise
        self._dealer.send(self._hello())

    def _hello(self) -> HelloClient:
        return HelloClient(PROTOCOL_VERSION, self._client_id, self.term)

    async def recv(self) -> ToClient:
        """The next message. Raises EngineClosed when the connection is lost, or was dropped."""
        message = await self._dealer.recv()
        self.heard = True
        return message

    def drop(self) -> None:
        """Let go of the coordinator; :meth:`recv` raises."""
        self._dealer.close(0.0)

    async def reconnect(self) -> None:
        """After the end of a connection: pause, longer each time until there is a welcome, and connect anew."""
        self.up = self.heard = False
        self.lost.set()
        self._unsent.clear()
        self._dealer.close(0.0)
        pause = min(FIRST_PAUSE_S * 2.0 ** min(self._attempts, 10), LONGEST_PAUSE_S)
        self._attempts += 1
        await asyncio.sleep(pause)
        self._dealer = Dealer(self._context, self.endpoint, Codec(ToClient))
        self._dealer.send(self._hello())

    def welcomed(self, welcome: WelcomeClient) -> bool:
        """Whether the coordinator may be followed: not one of an older term, which is left."""
        if welcome.term < self.term:
            self.drop()
            return False
        self.term = welcome.term
        self.up = True
        self.lost.clear()
        self._attempts = 0
        return True

    # -- out

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait for room in the socket."""
        return bool(self._unsent)

    def send(self, message: FromClient) -> None:
        """Sends ``message``, or keeps it until the socket takes it again; what is said to a lost one is dropped."""
        self._unsent.append(message)
        self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as there is room."""
        while self._unsent:
            # Taken out first: a message that cannot be encoded fails its sender alone, not everyone after it.
            message = self._unsent.popleft()
            if self._dealer.send(message) is SendResult.FULL:
                self._unsent.appendleft(message)
                return

    async def close(self) -> None:
        """Lets go of the socket; what was sent is delivered as far as its linger allows."""
        self._dealer.close()
        await asyncio.to_thread(self._context.term)
