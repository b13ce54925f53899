"""Hostile frames at both sockets, one million at each, while streams run and ranks are killed."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from drumline.engine.testing import FaultyEngine
from drumline.protocol.codec import Codec
from drumline.protocol.messages import FromClient, FromWorkerSide, InjectFaults
from tests.faults.hostile import BATCH, CLIENT_MESSAGES, WORKER_MESSAGES, Garbage, forged, fuzz
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import Streams
from tests.procfs import rss_bytes

FRAMES = 1_000_000
AT_ONCE = 200 * BATCH
FLAT_BYTES = 48 << 20
REASONS = ("malformed", "dropped", "wrong_token", "unknown_peer", "stale", "duplicate", "foreign")
SIDES: dict[str, Any] = {"client": FromClient, "worker": FromWorkerSide}


async def hostile(rng: random.Random, seconds: float) -> None:
    """Both sides in turn, each for at most half of the time."""
    async with FaultyEngine(LAYOUTS["dp2-ep"]) as faulty:
        streams = await Streams.learned(faulty.engine)
        async with streams.running():
            await streams.move_on()
            for side in SIDES:
                await at_side(faulty, streams, side, rng, time.monotonic() + seconds / 2)
        print("\n" + streams.report("hostile"))


async def at_side(faulty: FaultyEngine, streams: Streams, side: str, rng: random.Random, end: float) -> None:
    """Send to one socket and kill a rank now and then; the coordinator's memory stays flat."""
    local = faulty.engine._local
    assert local is not None
    endpoint = f"ipc://{local.runtime_dir}/{side}.sock"
    codec: Codec[Any] = Codec(SIDES[side])
    hello = [bytes(frame) for frame in codec.encode(CLIENT_MESSAGES[0])] if side == "client" else None
    sent, warm, pid = 0, 0, (await faulty.engine.status()).coordinator.pid
    while sent < FRAMES and (time.monotonic() < end or not warm):
        status = await faulty.engine.status()
        # This engine would obey.
        harmless = [one for one in CLIENT_MESSAGES if not isinstance(one, InjectFaults)]
        messages = harmless if side == "client" else [*WORKER_MESSAGES, *forged(status)]
        garbage = Garbage(messages, SIDES[side], rng.randrange(1 << 30))
        streams.fault("kill under fire")
        await asyncio.gather(fuzz(endpoint, garbage, hello, AT_ONCE), faulty.kill(rng.randrange(2)))
        sent += AT_ONCE
        await streams.move_on()
        await faulty.until_whole()
        warm = warm or rss_bytes(pid)
    status = await faulty.engine.status()
    assert status.coordinator.pid == pid
    grown = rss_bytes(pid) - warm
    assert grown < FLAT_BYTES, f"the coordinator has grown by {grown} bytes"
    assert status.requests.failed == 0
    counts = {name: count for name, count in status.counters.items() if count and any(one in name for one in REASONS)}
    assert counts[f"{side}_frames_dropped"] > sent // 2
    print(f"{side}: {sent} hostile frames, {grown >> 10} KiB more memory, {counts}")
