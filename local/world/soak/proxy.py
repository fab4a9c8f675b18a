"""The network between the function and PostgreSQL: a TCP proxy on loopback that breaks when it is told to.

The stream is TLS, so nothing here reads a message; a statement is known by its size. The function sends a batch in one round trip, hence the
first bytes that the server answers to it come after the commit: withheld and cut, they leave a commit that nobody heard of.
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
# How long the server has to say the rest of an answer that is withheld.
ANSWER_SECONDS = 0.02
# A half-open connection is closed at last, as keep-alive messages or a router would.
HALF_OPEN_SECONDS = 8
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """One connection of a client's and the one to the server behind it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter):
        self.writers = (client, server)
        # Bytes from the client since the server spoke last.
        self.asked = 0
        self.trap: Trap | None = None
        # Half-open: what comes in from either side goes nowhere.
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
    """Waits for the next statement on any connection: tears it (`torn`), or lets it commit and keeps the answer back, with a cut connection
    (`unheard`) or with a silent one (`silenced`)."""

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
        """Ends all connections, with RST or with FIN; returns how many there were."""

        async def cut() -> int:
            links = [link for link in self._links if not link.silent]
            for link in links:
                link.cut(reset)
            return len(links)

        return self._do(cut)

    def refuse(self, seconds: float) -> int:
        """Nobody listens for a while, and the connections that there are end; returns how many there were."""

        async def stop_listening() -> None:
            self._listener.close()

        self._do(stop_listening)
        cut = self.cut(reset=True)
        time.sleep(seconds)
        self._do(self._listen)
        return cut

    def delay(self, seconds: float, each: float) -> int:
        """For a while, all that passes is late; returns how many connections there were."""
        self._delay = each
        time.sleep(seconds)
        self._delay = 0.0
        return len(self._links)

    def stall(self, seconds: float) -> int:
        """All connections become half-open, as do those that are made meanwhile; returns how many there were."""

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
        """Sets a `Trap`; whether a statement went into it in time."""
        trap = self._trap = Trap(kind)
        sprung = trap.sprung.wait(patience)
        self._trap = None
        return sprung

    # The thread's own.

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
            # The end of one side is the end of the other, but for a half-open connection.
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
