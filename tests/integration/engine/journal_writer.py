"""Coordinators' journals in processes to be killed: ``python -m tests.integration.engine.journal_writer``.

Each line on stdin, of a path, a term, after how many bytes to compact and how large a file may be (0: any size), with
tabs between, starts one, which says its pid and then everything that was committed: how many tokens each stream had.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import resource
import signal
import sys

from drumline.engine.delivery import Delivery
from drumline.engine.journal import Journal
from tests.unit.engine.journal.told import Told, submit


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())


async def write_for_ever(path: str, term: int, dead_bytes: int) -> None:
    draw = random.Random(term)
    told = Told()

    journal, restored = Journal.open(
        path,
        term,
        on_state=functools.partial(say, "state"),
        on_superseded=functools.partial(say, "state"),
        dead_bytes=dead_bytes,
    )
    told.take_over(restored)
    delivery = Delivery(journal)
    number = term * 1_000_000
    while True:
        for _ in range(draw.randint(1, 4)):
            number += 1
            delivery.push(told.accept(submit(f"r{number}", n=draw.randint(1, 2))), lambda: None)
        for _ in range(draw.randint(1, 8)):
            batch = told.step(draw.randint(1, 3), ending=draw.choice(list(told.requests)))
            counts = " ".join(
                f"{streams[0].request.request_id}={','.join(str(len(stream.tokens)) for stream in streams)}"
                for streams in told.requests.values()
            )
            delivery.push(batch, functools.partial(say, "kept", counts))
            await asyncio.sleep(0)
        while len(told.requests) > 8:
            gone = draw.choice(list(told.requests))
            say("going", gone)
            delivery.push(told.forget(gone), functools.partial(say, "gone", gone))
        await asyncio.sleep(draw.random() * 0.002)


def main() -> None:
    for line in sys.stdin:
        path, term, dead_bytes, limit = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            if int(limit):
                # Writing past that fails like a failing disk does.
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
            say("pid", str(os.getpid()))
            asyncio.run(write_for_ever(path, int(term), int(dead_bytes)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # The last line of the child may have been cut short.
        say("\nended", str(status))


if __name__ == "__main__":
    main()
