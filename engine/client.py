"""The async engine, as an app embeds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
from tokenizers import Tokenizer

from drumline.engine.client_requests import ClientRequests
from drumline.engine.config import EngineConfig
from drumline.engine.connection import Connection
from drumline.engine.control_calls import check_method, check_timeout, pack_arguments, rank_reply
from drumline.engine.events import EventStream, EventStreams
from drumline.engine.expert_calls import ExpertCalls
from drumline.engine.generation import Generation
from drumline.engine.launch.external import ExternalLaunch
from drumline.engine.launch.local import LocalEngine, start_local
from drumline.engine.layout_report.report import LayoutReport
from drumline.engine.layout_report.running import report_of
from drumline.engine.outputs import RankReply
from drumline.engine.presence import Timing
from drumline.engine.prompts import check_request_id, load_tokenizer
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.settings import check_number
from drumline.engine.streams import RequestStream
from drumline.protocol.endpoints import VALID, check_endpoint
from drumline.protocol.errors import EngineClosed, InvalidConfig, ProtocolError, StartFailed
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    CallRanks,
    Cancel,
    Event,
    LayoutQuery,
    ModelInfo,
    StatusQuery,
    WelcomeClient,
)
from drumline.protocol.status import EngineStatus

CLOSE_TIMEOUT_S = 10.0
# A call to every rank is answered by the coordinator once its own timeout has passed; the answer needs time to travel.
_CALL_SLACK_S = 5.0


class AsyncEngine(ExpertCalls):
    """An engine that lives as long as this object is open::

        async with AsyncEngine(EngineConfig(model="demo")) as engine:
            async for out in engine.generate("Once upon", SamplingParams(max_tokens=64)):
                print(out.text_delta, end="", flush=True)

    Used from the event loop that started it. Requests may run side by side, one task each.
    ``on_event`` is called with every :class:`~drumline.protocol.messages.Event`: progress of the start, then faults.
    """

    def __init__(self, config: EngineConfig, *, on_event: Callable[[Event], None] | None = None) -> None:
        if not isinstance(config, EngineConfig):
            raise InvalidConfig("config", type(config).__name__, "an EngineConfig")
        faults = config.faults
        timing = Timing(start_silence_s=faults.start_deadline_s + 30.0, lease_s=faults.coordinator_lease_s)
        self._prepare(config, timing, on_event)

    def _prepare(self, config: EngineConfig | None, timing: Timing, on_event: Callable[[Event], None] | None) -> None:
        self._config = config
        self._on_event = on_event
        self._timing = timing
        self._events = EventStreams()
        self._launching: asyncio.Task[LocalEngine] | None = None
        self._local: LocalEngine | None = None
        self._connection: Connection | None = None
        self._requests: ClientRequests | None = None
        self._info: ModelInfo | None = None
        self._tokenizer: Tokenizer | None = None
        self._started = False
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls, endpoint: str, *, timeout: float = 30.0, on_event: Callable[[Event], None] | None = None
    ) -> AsyncEngine:
        """An engine that runs elsewhere on this machine, at the ``endpoint`` of whoever owns it::

            async with await AsyncEngine.connect("ipc:///run/user/0/drumline/engine.sock") as engine: ...

        Returns once it can serve. Closing it only leaves. Raises :class:`InvalidConfig` for an endpoint that is neither
        ``ipc://`` nor ``tcp://`` on a loopback address, :class:`EngineClosed` when nobody answers for ``timeout``
        seconds.
        """
        if not isinstance(endpoint, str):
            raise InvalidConfig("endpoint", endpoint, VALID)
        check_endpoint(endpoint)
        check_number("timeout", timeout, 0.0, 86400.0)
        engine = cls.__new__(cls)
        engine._prepare(None, Timing(start_silence_s=timeout, tick_s=min(1.0, timeout / 4)), on_event)
        engine._started = True
        try:
            engine._connection = Connection(endpoint, engine._timing, engine._tell)
            await engine._enter(await engine._connection.welcome)
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def config(self) -> EngineConfig:
        """What it was made with. Raises :class:`InvalidConfig` for an engine that was connected to."""
        if self._config is None:
            raise InvalidConfig("config", "none", "an engine of this process: one that runs elsewhere keeps its own")
        return self._config

    @property
    def endpoint(self) -> str:
        """Where others on this machine can :meth:`connect` to it."""
        return self._require_ready()[0].endpoint

    # -- life

    async def __aenter__(self) -> AsyncEngine:
        if self._config is not None:
            await self.start()
        self._check_not_closing()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self, on_event: Callable[[Event], None] | None = None) -> None:
        """Starts the processes and returns once requests can be served.

        Raises :class:`InvalidConfig` for a model or layout that cannot work, :class:`StartFailed` when a process
        fails; whatever had been started is gone then.
        """
        if self._started:
            raise EngineClosed("an engine starts once: make a new AsyncEngine")
        self._started = True
        if on_event is not None:
            self._on_event = on_event
        try:
            launching = self._launching = asyncio.create_task(start_local(self.config, self._tell))
            await asyncio.wait([launching])
            self._check_not_closing()
            local = self._local = launching.result()
            self._connection = Connection(local.client_endpoint, self._timing, self._tell, cause=local.failed)
            await self._enter(await self._connection.welcome)
            self._check_not_closing()
        except EngineClosed as error:
            await self.close()
            raise StartFailed(error.text, msgspec.structs.replace(error.info, kind=StartFailed.kind)) from error
        except BaseException:
            await self.close()
            raise

    def _check_not_closing(self) -> None:
        if self._closing is not None:
            raise EngineClosed("the engine is closed")

    async def _enter(self, welcome: WelcomeClient) -> None:
        if welcome.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the coordinator speaks protocol version {welcome.version}, this is {PROTOCOL_VERSION}"
            )
        if welcome.tokenizer:
            self._tokenizer = await asyncio.to_thread(load_tokenizer, welcome.tokenizer)
        self._info = welcome.info
        if self._connection is not None:
            self._requests = ClientRequests(self._connection, welcome.info, self._tokenizer)

    def _tell(self, event: Event) -> None:
        self._events.tell(event)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:  # the app's own mistake must not end the engine, and must not go unseen
            context = {"message": "on_event of AsyncEngine raised", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    async def close(self) -> None:
        """Ends the engine and everything it started, within about ten seconds; leaves one that was connected to.
        Idempotent; requests that still run raise :class:`EngineClosed`."""
        if self._closing is None:
            self._started = True
            self._closing = asyncio.create_task(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            # Whoever is cancelled here still leaves nothing behind; the wait is as bounded as it was.
            await asyncio.wait([self._closing])
            raise

    async def _close(self) -> None:
        if self._launching is not None and self._local is None:
            # Closed in the middle of a start: what it has started by now must not outlive this.
            self._launching.cancel()
            await asyncio.wait([self._launching])
            if not self._launching.cancelled() and self._launching.exception() is None:
                self._local = self._launching.result()
        if self._connection is not None:
            await self._connection.close()
        if self._local is not None:
            await self._local.close(CLOSE_TIMEOUT_S)
        self._events.end()

    # -- requests

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> Generation:
        """Iterates over the outputs of one request, which is submitted when iteration begins.

        ``prompt``: text or token ids. ``priority``: lower runs first. ``data_parallel_rank`` pins the request to one
        replica. Leaving the loop cancels at once. Raises (from the iteration) :class:`InvalidRequest`,
        :class:`DuplicateRequest`, ``QueueFull``, ``RequestFailed`` when a fault ends it, :class:`EngineClosed`.
        """

        async def open_stream() -> RequestStream:
            return await self._ready().submit(prompt, params, request_id, priority, data_parallel_rank)

        return Generation(open_stream, self._leave)

    def resume(self, request_id: str, positions: Sequence[int] = ()) -> Generation:
        """Iterates over a request from ``positions`` (generated tokens already read, by index; none given: from the
        start). The reader before it, if any, ends with ``RequestFailed``: the newest reader wins, also over one in
        another process. An engine goes on for ``resume_window_s`` with a request that nobody reads, if its id was
        chosen by its app; of one that another connection submitted the prompt's text is not known. Raises (from the
        iteration) :class:`InvalidRequest` for an id that is not known and positions that do not fit."""

        async def open_stream() -> RequestStream:
            return await self._ready().resume(request_id, positions)

        return Generation(open_stream, self._leave)

    async def cancel(self, request_id: str) -> None:
        """Returns when the request computes no more and its blocks are free; its reader sees finish_reason "abort".
        Cancelling one that has ended does nothing."""
        connection, _ = self._require_ready()
        check_request_id(request_id)
        await connection.call(lambda call_id: Cancel(call_id, request_id), f"cancel {request_id!r}")

    def _leave(self, stream: RequestStream) -> None:
        if self._requests is not None:
            self._requests.leave(stream)

    # -- questions

    def events(self) -> EventStream:
        """Iterates over what happens to the engine from now on (:class:`~drumline.protocol.messages.Event`): faults,
        recoveries, restarts. Ends when the engine closes. 1,024 events wait for a slow reader, who is told in
        ``dropped`` how many were more."""
        return self._events.open()

    @property
    def model_info(self) -> ModelInfo:
        """The model that is served: its limits and special tokens."""
        return self._require_ready()[1]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None where the folder has none."""
        self._require_ready()
        return self._tokenizer

    async def status(self) -> EngineStatus:
        """The state of the engine, its groups, replicas and ranks, at this moment."""
        connection, _ = self._require_ready()
        report = await connection.call(StatusQuery, "status")
        try:
            return msgspec.json.decode(report.status, type=EngineStatus)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the coordinator's status does not decode: {error}") from error

    async def layout(self) -> LayoutReport:
        """Which rank holds what: layers, heads, experts, bytes, groups. What ``drumline layout --json`` prints."""
        connection, _ = self._require_ready()
        facts = await connection.call(LayoutQuery, "layout")
        return await asyncio.to_thread(report_of, facts)

    async def collective_rpc(
        self,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[RankReply]:
        """Runs a method on every rank, between steps ("ping" and "stats" also within one); replies by rank.

        Callable are the worker's own ("expert_load") and the public methods of ``worker_cls`` and
        ``worker_extension_cls``. Arguments are what msgpack can carry, of the types that the method's annotations ask
        for; so are results. A rank that refuses, fails or does not answer within ``timeout`` seconds (5) has ``ok``
        False and an ``error`` that says why; a call that was given up still runs to its end there.
        """
        connection, _ = self._require_ready()
        name, limit, packed = check_method(method), check_timeout(timeout), pack_arguments(args, kwargs)
        result = await connection.call(
            lambda call_id: CallRanks(call_id, name, packed, limit), f"call {name!r}", limit + _CALL_SLACK_S
        )
        return sorted((rank_reply(answer) for answer in result.answers), key=lambda reply: reply.rank)

    @property
    def launch(self) -> ExternalLaunch | None:
        """How a job script starts the ranks that this engine does not start; None when it starts all, or has not begun
        to. It may start them once the event "waiting" has been told; :meth:`start` waits for them meanwhile."""
        return self._local.launch if self._local is not None else None

    def _ready(self) -> ClientRequests:
        self._require_ready()
        if self._requests is None:
            raise EngineClosed("the engine has not been started")
        return self._requests

    def _require_ready(self) -> tuple[Connection, ModelInfo]:
        self._check_not_closing()
        if self._connection is None or self._info is None:
            raise EngineClosed("the engine has not been started: use `async with AsyncEngine(config) as engine`")
        self._connection.check_open()
        return self._connection, self._info
