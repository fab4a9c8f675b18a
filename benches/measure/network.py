"""A proxy that adds network latency between a contender and PostgreSQL."""

import socket
import subprocess
import time

import psycopg
from measure.bench import Bench
from world.localstack import free_port

PATIENCE_SECONDS = 10


class Network:
    """Owns the proxy, which delays each byte by the given microseconds in each direction."""

    def __init__(self, bench: Bench, microseconds_each_way: int):
        self.bench = bench
        self.port = free_port()
        program = [bench.binaries / "delay", str(self.port), str(bench.servers.postgres.port), str(microseconds_each_way)]
        self._process = subprocess.Popen(program, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError("the delaying proxy does not listen")
            time.sleep(0.01)

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def round_trips(self, count: int) -> dict[str, list[int]]:
        """Nanoseconds of `select 1`, alternately without the proxy and through it."""
        ports = {"direct": self.bench.servers.postgres.port, "delayed": self.port}
        postgres = self.bench.servers.postgres
        login = {"host": "127.0.0.1", "user": "postgres", "password": postgres.admin_password, "dbname": "postgres", "sslmode": "disable"}
        connections = {way: psycopg.connect(**login, port=port, autocommit=True) for way, port in ports.items()}
        samples: dict[str, list[int]] = {way: [] for way in ports}
        for _ in range(count):
            for way, connection in connections.items():
                began = time.perf_counter_ns()
                connection.execute("select 1", prepare=True)
                samples[way].append(time.perf_counter_ns() - began)
        for connection in connections.values():
            connection.close()
        return samples
