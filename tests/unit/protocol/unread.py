"""A dealer that reads nothing until its router is gone and every timer of ZeroMQ has had its turn."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import zmq

from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed
from drumline.protocol.messages import Event, FromClient, Goodbye, ToClient
from drumline.protocol.sockets import Dealer, Router, SendResult

TIMERS_S = 5.0


async def main(endpoint: str) -> None:
    ours: zmq.Context[Any] = zmq.Context()
    theirs: zmq.Context[Any] = zmq.Context()
    incoming: Codec[Any] = Codec(FromClient)
    outgoing: Codec[Any] = Codec(ToClient)
    router = Router(theirs, endpoint, incoming, hwm=100_000)
    dealer = Dealer(ours, endpoint, outgoing)
    dealer.send(Goodbye("nobody"))
    peer, _ = await router.recv()
    while router.statistics().sent < 3000:
        if router.send(peer, Event("waiting", "x" * 2000)) is not SendResult.SENT:
            break
    await asyncio.sleep(0.3)
    router.close()
    theirs.term()
    await asyncio.sleep(TIMERS_S)
    count = 0
    try:
        async with asyncio.timeout(10):
            while True:
                await dealer.recv()
                count += 1
    except EngineClosed:
        print(f"{min(count, 1000)} messages, then the end")
    dealer.close()
    ours.term()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
