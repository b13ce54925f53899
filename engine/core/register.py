"""Requests that are known: by id, and by the connection that reads them."""

from __future__ import annotations

from drumline.engine.core.request import Request


class Register:
    """Requests from their acceptance until they are forgotten. ``by_id`` holds them in the order of arrival. Connection
    0 stands for nobody."""

    def __init__(self) -> None:
        self.by_id: dict[str, Request] = {}
        self._by_connection: dict[int, dict[str, Request]] = {}

    def add(self, request: Request) -> None:
        """A request is known from now on."""
        self.by_id[request.request_id] = request
        self._by_connection.setdefault(request.connection, {})[request.request_id] = request

    def of(self, connection: int) -> list[Request]:
        """What the connection reads, those that it has had for longest first."""
        return list(self._by_connection.get(connection, {}).values())

    def move(self, request: Request, connection: int) -> None:
        """The request is read by another connection from now on."""
        self._leave(request)
        request.connection = connection
        self._by_connection.setdefault(connection, {})[request.request_id] = request

    def remove(self, request: Request) -> None:
        """The request is known no more; its id is free."""
        del self.by_id[request.request_id]
        self._leave(request)

    def _leave(self, request: Request) -> None:
        own = self._by_connection.get(request.connection)
        if own is not None:
            own.pop(request.request_id, None)
            if not own:
                del self._by_connection[request.connection]
