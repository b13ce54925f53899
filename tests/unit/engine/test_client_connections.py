"""Numbered frames, acknowledgements, and readers that fall behind or leave."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import numpy as np

from drumline.engine.client_connections import MAX_PENDING, SILENCE_S, WINDOW, ClientConnection, Connections
from drumline.engine.core.outputs import ConnectionOutput
from drumline.protocol.messages import (
    Accepted,
    Behind,
    Cancelled,
    Event,
    Finished,
    Resumed,
    StreamEnd,
    ToClient,
    Tokens,
)
from drumline.protocol.sockets import SendResult


class Socket:
    """Takes what is sent, or says what it is told to say."""

    def __init__(self) -> None:
        self.sent: dict[bytes, list[ToClient]] = defaultdict(list)
        self.result = SendResult.SENT

    def send(self, identity: bytes, message: ToClient) -> SendResult:
        if self.result is SendResult.SENT:
            self.sent[identity].append(message)
        return self.result


def made() -> tuple[Connections, Socket, ClientConnection]:
    socket = Socket()
    connections = Connections(socket.send)
    return connections, socket, connections.open(b"a", "client", 0.0)


def one_token(connection: ClientConnection, position: int = 0) -> ConnectionOutput:
    def ints(value: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array([value], dtype=np.int32)

    return ConnectionOutput(connection.number, ints(1), ints(position), ints(7))


def one_end(connection: ClientConnection, request_id: str = "r", index: int = 0) -> ConnectionOutput:
    return ConnectionOutput(connection.number, ends=[StreamEnd(1 + index, request_id, index, "length", -1, 3)])


def resumed(ends: int, n: int = 1) -> Resumed:
    handles = np.arange(n, dtype=np.int32)
    tokens = tuple(np.zeros(3, dtype=np.int32) for _ in range(n))
    stream_ends = tuple(StreamEnd(index, "r", index, "stop", 2, 3) for index in range(ends))
    return Resumed(9, "r", np.zeros(2, dtype=np.int32), handles, tokens, stream_ends)


def test_tokens_and_ends_share_one_count_of_frames() -> None:
    connections, socket, client = made()
    output = one_token(client)
    output.ends = one_end(client).ends
    connections.deliver(output)
    connections.deliver(one_token(client, 1))
    frames = [message.frame for message in socket.sent[b"a"] if isinstance(message, Tokens | Finished)]
    assert frames == [1, 2, 3]
    assert isinstance(socket.sent[b"a"][1], Finished)


def test_with_a_full_window_nothing_is_sent_until_it_is_read_then_one_behind() -> None:
    connections, socket, client = made()
    for position in range(WINDOW + 5):
        connections.deliver(one_token(client, position))
    assert len(socket.sent[b"a"]) == WINDOW
    assert connections.counts.frames_left_out == 5
    connections.ack(client, WINDOW - 16)
    connections.deliver(one_token(client, WINDOW + 5))
    assert len(socket.sent[b"a"]) == WINDOW
    connections.ack(client, WINDOW)
    assert socket.sent[b"a"][-1] == Behind(WINDOW)
    connections.deliver(one_token(client, WINDOW + 6))
    last = socket.sent[b"a"][-1]
    assert isinstance(last, Tokens)
    assert last.frame == WINDOW + 1
    assert sum(isinstance(message, Behind) for message in socket.sent[b"a"]) == 1


def test_a_request_is_forgotten_when_its_last_end_is_acknowledged() -> None:
    connections, _, client = made()
    connections.accepted(client, "r", 2)
    connections.deliver(one_end(client, index=0))
    assert connections.ack(client, 1) == []
    connections.deliver(one_end(client, index=1))
    assert connections.ack(client, 1) == []
    assert connections.ack(client, 2) == ["r"]
    assert connections.ack(client, 2) == []


def test_an_end_that_was_left_out_is_forgotten_once_the_resume_that_holds_it_has_been_read() -> None:
    connections, socket, client = made()
    connections.accepted(client, "r", 1)
    for position in range(WINDOW):
        connections.deliver(one_token(client, position))
    connections.deliver(one_end(client))
    assert connections.ack(client, WINDOW) == []
    assert isinstance(socket.sent[b"a"][-1], Behind)
    assert not connections.resumed(client, resumed(ends=1))
    told = [message for message in socket.sent[b"a"] if isinstance(message, Resumed | Finished)]
    assert [type(message) for message in told] == [Resumed, Finished]
    assert client.open == {}
    assert connections.ack(client, WINDOW + 1) == ["r"]


def test_one_whose_resume_can_be_followed_by_no_frame_is_forgotten_at_once() -> None:
    connections, _, client = made()
    for position in range(WINDOW):
        connections.deliver(one_token(client, position))
    assert connections.resumed(client, resumed(ends=1))
    assert client.unread == 0


def test_a_resume_in_the_middle_leaves_the_other_ends_to_come() -> None:
    connections, _, client = made()
    connections.accepted(client, "r", 2)
    assert not connections.resumed(client, resumed(ends=1, n=2))
    connections.deliver(one_end(client, index=1))
    assert connections.ack(client, 1) == ["r"]


def test_an_end_that_stood_in_a_resume_and_comes_in_a_frame_too_counts_once() -> None:
    connections, _, client = made()
    connections.accepted(client, "r", 2)
    assert not connections.resumed(client, resumed(ends=1, n=2))
    connections.deliver(one_end(client, index=0))
    assert connections.ack(client, 1) == []
    connections.deliver(one_end(client, index=1))
    assert connections.ack(client, 2) == ["r"]


def test_an_acknowledgement_of_what_was_never_sent_is_refused_and_counted() -> None:
    connections, _, client = made()
    connections.deliver(one_token(client))
    assert connections.ack(client, 2) == []
    assert connections.ack(client, -1) == []
    assert (client.acked, connections.counts.acks_refused) == (0, 2)


def test_replies_wait_for_room_in_order_and_frames_do_not_overtake_them() -> None:
    connections, socket, client = made()
    socket.result = SendResult.FULL
    accepted = Accepted(1, "r", np.zeros(1, dtype=np.int32), 5)
    connections.reply(client, accepted)
    connections.reply(client, Event("x", "y"))
    assert connections.has_pending
    socket.result = SendResult.SENT
    connections.deliver(one_token(client))
    assert socket.sent[b"a"] == []
    connections.flush()
    assert socket.sent[b"a"] == [accepted, Event("x", "y"), Behind(0)]
    assert not connections.has_pending


def test_a_reader_without_anything_to_acknowledge_is_told_of_frames_that_found_no_room() -> None:
    connections, socket, client = made()
    socket.result = SendResult.FULL
    connections.deliver(one_token(client))
    assert connections.has_pending
    connections.flush()
    assert connections.has_pending
    socket.result = SendResult.SENT
    connections.flush()
    assert socket.sent[b"a"] == [Behind(0)]
    assert not connections.has_pending


def test_a_client_that_lets_replies_pile_up_is_disconnected() -> None:
    connections, socket, client = made()
    socket.result = SendResult.FULL
    for _ in range(MAX_PENDING + 1):
        connections.reply(client, Event("x", "y"))
    assert client.gone
    assert connections.take_gone() == [client]
    assert connections.take_gone() == []
    assert connections.counts.clients_overrun == 1
    assert not connections.has_pending


def test_a_client_that_is_gone_is_told_of_once_and_gets_nothing_more() -> None:
    connections, socket, client = made()
    other = connections.open(b"b", "other", 0.0)
    socket.result = SendResult.GONE
    connections.deliver(one_token(client))
    assert connections.take_gone() == [client]
    socket.result = SendResult.SENT
    connections.deliver(one_token(client))
    connections.reply(client, Event("x", "y"))
    connections.deliver(one_token(other))
    assert socket.sent[b"a"] == []
    assert len(socket.sent[b"b"]) == 1
    assert connections.of(b"a") is None


def test_only_clients_that_beat_are_missed_when_they_fall_silent() -> None:
    connections, _, client = made()
    connections.open(b"b", "never beats", 0.0)
    client.beats = True
    assert connections.silent(SILENCE_S) == []
    assert connections.silent(SILENCE_S + 0.1) == [client]
    assert len(connections) == 1


def test_cancels_are_confirmed_to_a_reader_that_is_behind_too() -> None:
    connections, socket, client = made()
    connections.accepted(client, "r", 1)
    for position in range(WINDOW + 1):
        connections.deliver(one_token(client, position))
    # The end was left out, and nobody will ask for it once the cancel is confirmed.
    output = one_end(client)
    output.cancelled = [(4, "r")]
    assert connections.deliver(output) == ["r"]
    assert socket.sent[b"a"][-1] == Cancelled(4, "r")
    assert client.open == {}


def test_requests_that_ended_unread_are_counted_until_they_are_read() -> None:
    connections, _, client = made()
    for request_id in ("sent", "left out", "cancelled"):
        connections.accepted(client, request_id, 1)
    connections.deliver(one_end(client, "sent"))
    for position in range(WINDOW):
        connections.deliver(one_token(client, position))
    connections.deliver(one_end(client, "left out"))
    output = one_end(client, "cancelled")
    assert connections.deliver(output) == []
    assert client.unread == 3
    connections.deliver(ConnectionOutput(client.number, cancelled=[(4, "cancelled")]))
    assert client.unread == 2
    connections.ack(client, WINDOW)
    assert client.unread == 1
    connections.resumed(client, msgspec.structs.replace(resumed(ends=1), request_id="left out"))
    assert client.unread == 1
    assert connections.ack(client, WINDOW + 1) == ["left out"]
    assert client.unread == 0


def test_a_cancel_of_a_request_whose_end_was_sent_leaves_it_to_the_acknowledgement() -> None:
    connections, _, client = made()
    connections.accepted(client, "r", 1)
    output = one_end(client)
    output.cancelled = [(4, "r")]
    assert connections.deliver(output) == []
    assert connections.ack(client, 1) == ["r"]


def test_a_late_confirmation_leaves_the_request_alone_that_has_the_id_now() -> None:
    connections, _, client = made()
    connections.accepted(client, "r", 1)
    connections.deliver(one_end(client))
    assert connections.ack(client, 1) == ["r"]
    connections.accepted(client, "r", 1)
    assert connections.deliver(ConnectionOutput(client.number, cancelled=[(4, "r")])) == []
    connections.deliver(one_end(client))
    assert connections.ack(client, 2) == ["r"]


def test_a_second_hello_is_the_same_connection() -> None:
    connections, _, client = made()
    assert connections.open(b"a", "client", 5.0) is client
    assert client.heard_at == 5.0
    assert connections.numbered(client.number) is client
