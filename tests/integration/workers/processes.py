"""The owner's end of worker processes: a forkserver to start them, a socket to command them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import zmq

from drumline.protocol.codec import Codec, config_digest
from drumline.protocol.messages import (
    NO_FETCHES,
    PROTOCOL_VERSION,
    Admit,
    BeatWorker,
    Configure,
    Fault,
    FromWorker,
    HelloWorker,
    Injection,
    Leave,
    Left,
    Load,
    Loaded,
    Member,
    Message,
    OpenStore,
    Ready,
    SamplingSpec,
    Step,
    StoreReady,
    WelcomeWorker,
    WorkerConfig,
)
from drumline.protocol.sockets import Router, SendResult

M = TypeVar("M", bound=Message)
DEADLINE_S = 20.0
NONE = np.zeros(0, dtype=np.int32)
NO_EXPERTS = np.zeros((0, 0), dtype=np.int32)


def i32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, dtype=np.int32)


class ForkServerProcess:
    """A real forkserver, and the write end of its lifeline."""

    def __init__(self, stderr: Path) -> None:
        read_end, self.lifeline = os.pipe()
        self.stderr = stderr
        with stderr.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "drumline.workers.forkserver", "--lifeline-fd", str(read_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                pass_fds=[read_end],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.close(read_end)
        self._reports: list[dict[str, Any]] = []
        assert self.expect("ready") == self.process.pid

    def spawn(self, rank: int, endpoint: str, token: str = "secret") -> int:
        """Returns the pid."""
        self._command({"spawn": [rank, endpoint, token]})
        spawned_rank, pid = self.expect("spawned")
        assert spawned_rank == rank
        return cast(int, pid)

    def kill(self, pid: int, number: int) -> None:
        self._command({"kill": [pid, number]})

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def _command(self, command: dict[str, Any]) -> None:
        body = msgspec.msgpack.encode(command)
        self.write(struct.pack(">I", len(body)) + body)

    def expect(self, kind: str, timeout_s: float = DEADLINE_S) -> Any:
        """The next report of that kind; others are kept for whoever expects them."""
        deadline = time.monotonic() + timeout_s
        while True:
            for report in self._reports:
                if kind in report:
                    self._reports.remove(report)
                    return report[kind]
            self._reports.append(self._read_report(deadline))

    def expect_exit(self, pid: int, timeout_s: float = DEADLINE_S) -> tuple[int, int, str]:
        """The exit code, the signal, and the tail of stderr of ``pid``."""
        others = []
        try:
            while True:
                report = self.expect("exited", timeout_s)
                if report[1] == pid:
                    return report[2], report[3], report[4]
                others.append({"exited": report})
        finally:
            self._reports += others

    def _read_report(self, deadline: float) -> dict[str, Any]:
        (length,) = struct.unpack(">I", self._read(4, deadline))
        return cast(dict[str, Any], msgspec.msgpack.decode(self._read(length, deadline)))

    def _read(self, count: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        data = b""
        while len(data) < count:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(fd, count - len(data)) if ready else b""
            if not chunk:
                raise AssertionError(f"the forkserver said no more; its stderr:\n{self.stderr.read_text()}")
            data += chunk
        return data

    def close(self) -> int:
        """End it by the end of its commands, as an owner that closes does."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        code = self.process.wait(10)
        with contextlib.suppress(OSError):
            os.close(self.lifeline)
        return code


class CoordinatorEnd:
    """A coordinator reduced to its socket. Use inside a running event loop."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.router: Router[FromWorker] = Router(self._context, f"ipc://{folder}/worker.sock", Codec(FromWorker))
        self.endpoint = self.router.endpoint
        self.hellos: dict[int, HelloWorker] = {}
        self.beats: list[BeatWorker] = []
        self._identities: dict[int, bytes] = {}
        self._ranks: dict[bytes, int] = {}
        self.kept: list[tuple[int, FromWorker]] = []

    async def expect(self, kind: type[M], rank: int | None = None, timeout_s: float = DEADLINE_S) -> M:
        """The next message of a kind (from a rank); others are kept for whoever expects them, beats aside."""
        async with asyncio.timeout(timeout_s):
            while True:
                for entry in self.kept:
                    if isinstance(entry[1], kind) and rank in (None, entry[0]):
                        self.kept.remove(entry)
                        return entry[1]
                await self._receive()
                fault = self.kept[-1][1] if self.kept else None
                if isinstance(fault, Fault) and not issubclass(Fault, kind):
                    raise AssertionError(f"{kind.__name__} expected, found a fault:\n{fault.error.traceback}")

    def holds(self, kind: type[Message]) -> bool:
        """Whether a message of that kind has come and nobody has expected it yet."""
        return any(isinstance(message, kind) for _, message in self.kept)

    async def expect_beats(self, count: int, timeout_s: float = DEADLINE_S) -> None:
        """That many more beats."""
        wanted = len(self.beats) + count
        async with asyncio.timeout(timeout_s):
            while len(self.beats) < wanted:
                await self._receive()

    async def _receive(self) -> None:
        identity, message = await self.router.recv()
        if isinstance(message, HelloWorker):
            self.hellos[message.rank] = message
            self._identities[message.rank] = identity
            self._ranks[identity] = message.rank
        if isinstance(message, BeatWorker):
            self.beats.append(message)
        else:
            self.kept.append((self._ranks[identity], message))

    def send(self, rank: int, message: Message) -> SendResult:
        return self.router.send(self._identities[rank], message)

    def send_raw(self, rank: int, frames: list[bytes]) -> SendResult:
        return self.router.send_encoded(self._identities[rank], frames)

    async def welcome(
        self, rank: int, config: WorkerConfig, term: int = 1, injections: tuple[Injection, ...] = ()
    ) -> HelloWorker:
        hello = await self.expect(HelloWorker, rank)
        self.welcome_again(rank, config, term, injections)
        return hello

    def welcome_again(
        self, rank: int, config: WorkerConfig, term: int = 1, injections: tuple[Injection, ...] = ()
    ) -> None:
        """Welcome a rank whose Hello has been read."""
        self.send(rank, WelcomeWorker(PROTOCOL_VERSION, term, config_digest(config), config, injections))

    async def load(self, rank: int, config: WorkerConfig, placement: Any = NO_EXPERTS, term: int = 1) -> Loaded:
        """Have ``rank`` load what it holds of ``placement``: its share, or with expert parallelism off everything."""
        self.send(rank, Load(term, own_experts(config, placement, rank)))
        return await self.expect(Loaded, rank)

    async def leave(self, ranks: list[int], epoch: int, term: int = 1) -> list[Left]:
        for rank in ranks:
            self.send(rank, Leave(term, epoch))
        return [await self.expect(Left, rank) for rank in ranks]

    async def open_store(self, rank: int, epoch: int, term: int = 1) -> StoreReady:
        self.send(rank, OpenStore(term, epoch, "127.0.0.1"))
        store = await self.expect(StoreReady, rank)
        assert (store.term, store.epoch, store.host) == (term, epoch, "127.0.0.1")
        return store

    async def configure(
        self,
        ranks: list[int],
        placement: Any,
        *,
        epoch: int = 1,
        term: int = 1,
        store: StoreReady | None = None,
        parked: tuple[int, ...] = (),
        fetches: Any = NO_FETCHES,
        wait: bool = True,
    ) -> list[Ready]:
        host, port = (store.host, store.port) if store is not None else ("", 0)
        members, others = self._members(ranks), self._members(parked)
        for rank in (*ranks, *parked):
            role = "parked" if rank in parked else "compute"
            order = Configure(term, epoch, role, members, host, port, placement, others, NONE, fetches)
            self.send(rank, order)
        return [await self.expect(Ready, rank) for rank in (*ranks, *parked)] if wait else []

    def _members(self, ranks: Iterable[int]) -> tuple[Member, ...]:
        return tuple(Member(rank, self.hellos[rank].incarnation) for rank in ranks)

    def close_router(self) -> None:
        """Go away."""
        self.router.close(0.0)

    def reopen(self) -> None:
        """Go away, and be another coordinator at the same endpoint, to which nobody has said Hello."""
        self.close_router()
        self._identities.clear()
        self._ranks.clear()
        self.kept.clear()
        self.hellos.clear()
        self.router = Router(self._context, self.endpoint, Codec(FromWorker))

    def close(self) -> None:
        self.router.close(0.0)
        self._context.term()


def worker_config(model: Path | str, *, dp: int = 1, expert_parallel: bool = False, **changes: Any) -> WorkerConfig:
    config = WorkerConfig(
        model=str(model),
        dtype="auto",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        block_size=16,
        num_blocks=64,
        kv_cache_memory_bytes=0,
        gpu_memory_utilization=0.9,
        data_parallel_size=dp,
        enable_expert_parallel=expert_parallel,
        local_ranks=dp,
        num_threads=1,
    )
    return msgspec.structs.replace(config, **changes)


def own_experts(config: WorkerConfig, placement: Any, rank: int) -> Any:
    """The experts in the slots of ``rank`` under ``placement``, (0, 0) with expert parallelism off."""
    layout = config.layout
    if not config.enable_expert_parallel or not placement.size:
        return NO_EXPERTS
    share = placement.shape[1] // layout.ep_size
    at = layout.ep_rank(rank)
    return np.ascontiguousarray(placement[:, at * share : (at + 1) * share])


def step(number: int, tokens_across_dp: list[int], *, epoch: int = 1, term: int = 1, **changes: Any) -> Step:
    plain = Step(term, epoch, 0, number, i32(*tokens_across_dp), NONE, (), NONE, NONE, NONE, NONE)
    return msgspec.structs.replace(plain, **changes)


def admission(
    prompt: list[int], row: int = 0, blocks: tuple[int, ...] = (0, 1), num_cached: int = 0, **sampling: Any
) -> dict[str, Any]:
    """The parts of a Step that admit one greedy row and compute its whole prompt, but for what is cached."""
    spec = SamplingSpec(**({"temperature": 0.0} | sampling))
    admit = Admit(row, i32(*prompt), len(prompt), num_cached, i32(*blocks), spec)
    return {"admitted": (admit,), "prefill_rows": i32(row), "prefill_counts": i32(len(prompt) - num_cached)}


def wait_until_gone(pids: list[int], timeout_s: float) -> float:
    """Seconds until none of ``pids`` is a living process. Fails after the timeout."""
    start = time.monotonic()
    while living := [pid for pid in pids if _alive(pid)]:
        if time.monotonic() - start > timeout_s:
            raise AssertionError(f"still there after {timeout_s} s: {living}")
        time.sleep(0.005)
    return time.monotonic() - start


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state != "Z"


def open_descriptors(pid: int) -> dict[int, str]:
    """What each descriptor of a process is open on."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(link.name)] = str(link.readlink())
    return found


def proc_file(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def start_by_hand(rank: int, endpoint: str, token_file: Path) -> subprocess.Popen[bytes]:
    """A worker without a forkserver."""
    arguments = ["--coordinator", endpoint, "--rank", str(rank), "--token-file", str(token_file)]
    return subprocess.Popen([sys.executable, "-m", "drumline.workers", *arguments], stderr=subprocess.DEVNULL)
