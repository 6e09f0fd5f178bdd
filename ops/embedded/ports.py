"""The ports of the stack: all on loopback, checked before anything starts."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil

from ops.embedded.process import StackError

HOST = "127.0.0.1"
LOWEST = 15_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")

VARIABLES = {
    "gateway": "TIDEGATE_PORT",
    "metrics": "TIDEGATE_METRICS_PORT",
    "flower": "TIDEGATE_FLOWER_PORT",
    "postgres": "TIDEGATE_POSTGRES_PORT",
    "redis": "TIDEGATE_REDIS_PORT",
    "rabbitmq": "TIDEGATE_RABBITMQ_PORT",
    "rabbitmq_dist": "TIDEGATE_RABBITMQ_DIST_PORT",
    "epmd": "TIDEGATE_EPMD_PORT",
    "triton_http": "TIDEGATE_TRITON_HTTP_PORT",
    "triton_grpc": "TIDEGATE_TRITON_GRPC_PORT",
    "triton_metrics": "TIDEGATE_TRITON_METRICS_PORT",
}


@dataclass(frozen=True, slots=True)
class Ports:
    """Where each process listens. 0: any free port."""

    gateway: int = 0
    metrics: int = 0
    """Where the gateway shows its metrics."""
    flower: int = 0
    postgres: int = 0
    redis: int = 0
    rabbitmq: int = 0
    rabbitmq_dist: int = 0
    """Where RabbitMQ's own tools reach it."""
    epmd: int = 0
    triton_http: int = 0
    triton_grpc: int = 0
    triton_metrics: int = 0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Ports:
        """The ports named in the environment; 8080 and 5555 for what people open in a browser."""
        chosen = {"gateway": 8080, "flower": 5555}
        for name, variable in VARIABLES.items():
            text = environ.get(variable, "")
            if not text:
                continue
            if not text.isascii() or not text.isdigit() or int(text) > 65535:
                raise StackError(f"{variable}={text!r} is not a port: a number from 0 to 65535")
            chosen[name] = int(text)
        return cls(**chosen)

    def resolved(self) -> Ports:
        """These ports, all free right now, and every 0 replaced.

        Raises StackError naming the first port that is taken, and how to choose another.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        taken = {port for port in values.values() if port}
        for name, port in values.items():
            if port and not is_free(port):
                raise StackError(
                    f"port {port} for {name} is taken{_holder(port)}."
                    f" Choose another: {VARIABLES[name]}=<port>"
                )
        for name, port in values.items():
            if not port:
                values[name] = free_port(taken)
                taken.add(values[name])
        twice = {port for port in values.values() if list(values.values()).count(port) > 1}
        if twice:
            names = [VARIABLES[name] for name, port in values.items() if port in twice]
            raise StackError(f"port {min(twice)} is given twice: {', '.join(names)}")
        return replace(self, **values)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that linger after a restart are no reason to refuse.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(taken: set[int]) -> int:
    """A free port below the range the kernel gives to clients.

    Not one of that range, as binding port 0 would give: while a server there restarts, a client
    that keeps trying can be handed the server's port as its own and connect to itself.
    """
    highest = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_768
    candidates = range(LOWEST, highest) if highest > LOWEST + 1_000 else range(2_000, 65_536)
    for _ in range(1_000):
        port = random.choice(candidates)
        if port not in taken and is_free(port):
            return port
    raise StackError(f"no free port found from {candidates[0]} to {candidates[-1]}")


def _holder(port: int) -> str:
    """Who listens there, where we may know it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr if connection.status == psutil.CONN_LISTEN else ()
            if address and address.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
