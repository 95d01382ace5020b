"""What a client may not do to the server: send too much, or too slowly; and a line in the metrics for each request."""

import asyncio
from contextlib import suppress

import h11
from fastapi import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol


class Guard:
    """Around every request: its bytes, its seconds, and its line in the metrics."""

    def __init__(self, app, server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        options, loop = self.server.options, asyncio.get_running_loop()
        headers = dict(scope["headers"])
        length = int(headers.get(b"content-length", 0))
        began, received, status = loop.time(), 0, 500
        whole = not length and b"transfer-encoding" not in headers

        def check_length() -> None:
            if max(received, length) > options.max_bytes:
                raise HTTPException(413, f"The request is longer than {options.max_bytes} bytes.")

        async def receive_in_time():
            nonlocal received, whole
            if whole:
                return await receive()
            check_length()  # what is announced, before it is sent
            try:
                async with asyncio.timeout_at(began + options.timeout):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"The request took longer than {options.timeout:g} seconds.") from None
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "The client left before the request was whole.")
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            check_length()
            return message

        async def throw_away() -> None:
            """Most clients read an answer when they have sent all: of a connection closed before they see nothing."""
            nonlocal whole
            with suppress(TimeoutError):
                async with asyncio.timeout_at(began + options.timeout):
                    while not whole:
                        whole = not (await receive()).get("more_body", False)

        async def send_in_time(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (received == 0 and b"expect" in headers):  # who asks first will not send it
                    await throw_away()
                if not whole:  # or what still comes would keep the connection for ever
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            async with asyncio.timeout(options.timeout):
                await send(message)

        try:
            await self.app(scope, receive_in_time, send_in_time)
        finally:
            path = scope["path"] if scope.get("endpoint") is not None else "other"
            self.server.requests.labels(path, status).inc()
            self.server.seconds.observe(loop.time() - began)
            if status >= 400:
                self.server.errors.labels(status).inc()


def timed_protocol(timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, which by itself waits for ever for the head of a request."""

    class Timed(H11Protocol):
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, error) -> None:
            self._stop()
            super().connection_lost(error)

        def _watch(self) -> None:
            if self.conn.states[h11.CLIENT] is not h11.IDLE:
                self._stop()
            elif self.late is None:
                self.late = self.loop.call_later(timeout, self.transport.close)

        def _stop(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

    return Timed
