"""Requests of an app: submitted, taken over from another connection, left."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Sequence

import msgspec
from tokenizers import Tokenizer

from drumline.engine.connection import Connection
from drumline.engine.prompts import check_request_id, params_from_bytes, prompt_ids, submit_message
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.streams import RequestStream
from drumline.protocol.errors import DrumlineError, DuplicateRequest, InvalidRequest, RequestFailed
from drumline.protocol.messages import ModelInfo, Resumed, Submit


class ClientRequests:
    """The requests of one connection, which serves the model of ``info``."""

    def __init__(self, connection: Connection, info: ModelInfo, tokenizer: Tokenizer | None) -> None:
        self._connection = connection
        self._info = info
        self._tokenizer = tokenizer

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        data_parallel_rank: int | None,
    ) -> RequestStream:
        """Returns once the engine has taken the request in. One whose id the app chose outlives its connection."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequest("params", type(params).__name__, "a SamplingParams")
        durable = request_id is not None
        request_id = f"request-{uuid.uuid4().hex[:16]}" if request_id is None else request_id
        check_request_id(request_id)
        ids = await prompt_ids(prompt, self._tokenizer, self._info)
        submit = submit_message(
            request_id,
            ids,
            params,
            self._info,
            priority=priority,
            data_parallel_rank=data_parallel_rank,
            durable=durable,
        )
        await self._wait_for_id(request_id)
        stream = self._stream(request_id, prompt if isinstance(prompt, str) else None, ids, params)
        connection = self._connection
        connection.inbox.add(stream)

        def message(call_id: int) -> Submit:
            stream.submit = msgspec.structs.replace(submit, call_id=call_id)
            return stream.submit

        try:
            await connection.call(message, f"submit {request_id!r}")
        except DrumlineError as error:
            connection.inbox.remove(stream)
            if isinstance(error, RequestFailed):
                connection.cancel_quietly(request_id)  # no answer in time: it may have been accepted all the same
            raise
        except BaseException:
            self.leave(stream)
            raise
        return stream

    def _stream(self, request_id: str, text: str | None, ids: list[int], params: SamplingParams) -> RequestStream:
        return RequestStream(request_id, text, ids, params, self._tokenizer, self._info.eos_token_ids)

    async def _wait_for_id(self, request_id: str) -> None:
        """An id is free once the engine has let go of it: that takes a moment after the reader has."""
        connection = self._connection
        if request_id in connection.inbox.requests:
            await asyncio.sleep(0)  # an iterator that was dropped just now says so in the loop's next turn
        while (live := connection.inbox.requests.get(request_id)) is not None:
            if not (live.finished or live.left):
                raise DuplicateRequest(f"request {request_id!r} is running")
            try:
                async with asyncio.timeout(connection.timing.answer_s):
                    await live.released.wait()
            except TimeoutError:
                raise DuplicateRequest(f"request {request_id!r} has not ended in the engine yet") from None
            connection.check_open()

    async def resume(self, request_id: str, positions: Sequence[int]) -> RequestStream:
        """The stream of a request, for a new reader that starts at ``positions``. One that this connection does not
        have is taken over from the one that has it, or had."""
        check_request_id(request_id)
        wanted = _positions(positions)
        stream = self._connection.inbox.requests.get(request_id)
        if stream is None:
            stream = await self._connection.attach(request_id, wanted, self._taken_over)
        start = wanted or (0,) * len(stream.sequences)
        if len(start) != len(stream.sequences) or any(
            not 0 <= at <= have for at, have in zip(start, stream.positions, strict=True)
        ):
            raise InvalidRequest("positions", start, f"one for each index, at most {stream.positions}")
        stream.rewind(start)
        return stream

    def _taken_over(self, resumed: Resumed) -> RequestStream:
        """The stream of a request that another connection submitted, as far as the engine tells of it."""
        params = params_from_bytes(resumed.client_params)
        if params.n != len(resumed.tokens):
            raise InvalidRequest("client_params", f"n {params.n}", f"n {len(resumed.tokens)}, as the request has")
        ids = resumed.prompt.tolist()
        stream = self._stream(resumed.request_id, None, ids, params)
        submit = submit_message(
            resumed.request_id, ids, params, self._info, priority=0, data_parallel_rank=None, durable=True
        )
        sampling = msgspec.structs.replace(submit.sampling, seed=resumed.seed)
        max_tokens = resumed.max_tokens or submit.max_tokens
        stream.submit = msgspec.structs.replace(submit, sampling=sampling, seed_given=True, max_tokens=max_tokens)
        return stream

    def leave(self, stream: RequestStream) -> None:
        """The reader is gone: what still runs is cancelled. The id is free when the engine has confirmed it."""
        if stream.released.is_set() or stream.left:
            return
        stream.left = True
        if not stream.finished:
            self._connection.cancel_quietly(stream.request_id)


def _positions(positions: object) -> tuple[int, ...]:
    """A caller may ignore the annotations: anything can come here."""
    if isinstance(positions, Iterable):
        found = tuple(positions)
        if all(isinstance(at, int) and not isinstance(at, bool) and 0 <= at < 1 << 31 for at in found):
            return found
    raise InvalidRequest("positions", positions, "how many generated tokens were read, one number for each index")
