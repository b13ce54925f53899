"""A peer in a process of its own: says Beat(pid), then answers every message with Beat(number of messages so far)."""

from __future__ import annotations

import os
import sys
from typing import Any

import zmq

from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed
from drumline.protocol.messages import Beat, ToWorker
from drumline.protocol.sockets import ThreadDealer


def main(endpoint: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    codec: Codec[Any] = Codec(ToWorker)
    dealer = ThreadDealer(context, endpoint, codec)
    dealer.send(Beat(os.getpid()))
    count = 0
    try:
        while True:
            dealer.poll(timeout_s=30.0)
            while dealer.recv_nowait() is not None:
                count += 1
                dealer.send(Beat(count))
    except EngineClosed as error:
        print(error, flush=True)
    finally:
        dealer.close(0.0)
        context.term()


if __name__ == "__main__":
    main(sys.argv[1])
