"""The network between the function and PostgreSQL: a TCP proxy on loopback that breaks on command.

The stream is TLS, so the proxy cannot read it; it recognises a statement by its size. The function sends a batch in one round trip, so the
server's first answer comes after the commit. If the proxy withholds the answer and cuts the connection, the client does not know of the commit.
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")

# More than any handshake message of a client, less than a batch of ten.
STATEMENT_BYTES = 2500
# How long the server may send the rest of a withheld answer.
ANSWER_SECONDS = 0.02
# After this time a half-open connection is closed, as by TCP keepalives or a router.
HALF_OPEN_SECONDS = 8
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """A client's connection, and the connection to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter):
        self.writers = (client, server)
        # Bytes from the client since the server's last bytes.
        self.asked = 0
        self.trap: Trap | None = None
        # Half-open: bytes from either side are dropped.
        self.silent = False

    def cut(self, reset: bool) -> None:
        for writer in self.writers:
            if reset:
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                writer.transport.abort()
            else:
                writer.close()


class Trap:
    """Waits for the next statement on any connection: sends half of it and cuts the connection (`torn`), or lets it commit and withholds the
    answer, and then cuts the connection (`unheard`) or leaves it half-open (`silenced`)."""

    def __init__(self, kind: str):
        self.kind = kind
        self.sprung = threading.Event()


class Proxy:
    """Owns a listener on 127.0.0.1 and the thread that serves it, as a context manager. Its commands may come from any thread."""

    def __init__(self, server_port: int):
        self._server_port = server_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._links: set[Link] = set()
        self._trap: Trap | None = None
        self._delay = 0.0
        self._stalled = False

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self.port = 0
        self._do(self._listen)
        return self

    def __exit__(self, *_) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # Commands.

    def cut(self, reset: bool) -> int:
        """Ends all connections, with RST or with FIN; returns their number."""

        async def cut() -> int:
            links = [link for link in self._links if not link.silent]
            for link in links:
                link.cut(reset)
            return len(links)

        return self._do(cut)

    def refuse(self, seconds: float) -> int:
        """Stops listening for a while, and ends all connections; returns their number."""

        async def stop_listening() -> None:
            self._listener.close()

        self._do(stop_listening)
        cut = self.cut(reset=True)
        time.sleep(seconds)
        self._do(self._listen)
        return cut

    def delay(self, seconds: float, each: float) -> int:
        """Delays all bytes for a while; returns the number of connections."""
        self._delay = each
        time.sleep(seconds)
        self._delay = 0.0
        return len(self._links)

    def stall(self, seconds: float) -> int:
        """Makes all connections half-open, including new ones in this time; returns their number."""

        async def silence() -> None:
            self._stalled = True
            for link in self._links:
                self._silence(link)

        async def end() -> int:
            self._stalled = False
            return sum(link.silent for link in self._links)

        self._do(silence)
        time.sleep(seconds)
        return self._do(end)

    def spring(self, kind: str, patience: float) -> bool:
        """Sets a `Trap`; returns whether it caught a statement in time."""
        trap = self._trap = Trap(kind)
        sprung = trap.sprung.wait(patience)
        self._trap = None
        return sprung

    # Runs in the thread.

    def _do(self, coroutine: Callable[[], Awaitable[Result]]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine(), self._loop).result()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._listener.close()
        for link in list(self._links):
            link.cut(reset=True)
        # The pumps end by themselves.
        while self._links:
            await asyncio.sleep(0.01)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            to_client.transport.abort()
            return
        link = Link(to_client, to_server)
        self._links.add(link)
        if self._stalled:
            self._silence(link)
        pumps = [
            asyncio.create_task(self._pump(from_client, to_server, link, self._asked)),
            asyncio.create_task(self._pump(from_server, to_client, link, self._answered)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # If one side ends, the other is closed, except with a half-open connection.
            while link.silent and not all(pump.done() for pump in pumps) and not to_server.is_closing():
                await asyncio.sleep(0.1)
            link.cut(reset=False)
            for pump in pumps:
                pump.cancel()
            self._links.discard(link)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: Link, passing: Callable) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if link.silent:
                    continue
                if await passing(link, data):
                    sink.write(data)
                    await sink.drain()

    async def _asked(self, link: Link, data: bytes) -> bool:
        """Whether the client's bytes pass."""
        link.asked += len(data)
        if link.asked < STATEMENT_BYTES or link.trap or not self._trap:
            return True
        link.trap, self._trap = self._trap, None
        if link.trap.kind != "torn":
            return True
        to_server = link.writers[1]
        to_server.write(data[: len(data) // 2])
        await to_server.drain()
        link.cut(reset=False)
        link.trap.sprung.set()
        return False

    async def _answered(self, link: Link, data: bytes) -> bool:
        """Whether the server's bytes pass."""
        link.asked = 0
        if not link.trap:
            return True
        if link.trap.kind == "silenced":
            self._silence(link)
        else:
            await asyncio.sleep(ANSWER_SECONDS)
            link.cut(reset=True)
        link.trap.sprung.set()
        return False

    def _silence(self, link: Link) -> None:
        if not link.silent:
            link.silent = True
            self._loop.call_later(HALF_OPEN_SECONDS, link.cut, True)
