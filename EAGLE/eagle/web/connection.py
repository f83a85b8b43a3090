"""Connections of the server: those that send no request are closed, so that they cannot keep others out."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""From the beginning of a connection, or the end of an answer, until the head of a request is complete."""
MAX_CONNECTIONS = 256
"""One more closes the connection that has waited longest for a request."""


class Connection(H11Protocol):
    """uvicorn's protocol with `REQUEST_SECONDS` and `MAX_CONNECTIONS`. uvicorn does not limit the head of a request."""

    idle_since: float | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_request()
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [
                each for each in self.connections if isinstance(each, Connection) and each.idle_since is not None
            ]
            min(waiting, key=lambda each: each.idle_since or 0.0).drop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()  # may begin the next request
        if not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Closes the connection without waiting for what the client does not read."""
        self._stop_waiting()
        self.transport.abort()

    def _wait_for_request(self) -> None:
        self._stop_waiting()
        self.idle_since = self.loop.time()
        self._timer = self.loop.call_later(REQUEST_SECONDS, self.drop)

    def _stop_waiting(self) -> None:
        self.idle_since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
