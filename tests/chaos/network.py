"""Networks that fail: a worker in a network namespace of its own, each of whose links can be cut.

The kernel there neither hears nor is heard, as where a cable is pulled: nothing is refused, nothing
is closed, and what is sent is sent again. A proxy in user space could not do that: its kernel would
go on acknowledging.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ops.embedded.ports import HOST

SERVICES = ("postgres", "redis", "triton")


class Impossible(Exception):
    """Not on this machine; the message says why."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise Impossible(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Forwarder:
    """Passes bytes between connections to one address and one local port."""

    def __init__(self, address: str, port: int):
        self._target = (HOST, port)
        self._listener = socket.create_server((address, port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                near.close()  # as the target would have
                continue
            far.settimeout(None)
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_pass, args=(one, other), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _pass(source: socket.socket, sink: socket.socket) -> None:
    try:
        while block := source.recv(65536):
            sink.sendall(block)
    except OSError:
        pass
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Namespace:
    """A network namespace whose only ways out lead to the stack's stores, a link each."""

    name: str
    links: Mapping[str, str]
    """The near end of each service's link."""
    env: Mapping[str, str]
    """Where the services are, seen from inside."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words before a command that is to run inside."""
        return ("ip", "netns", "exec", self.name)

    @contextlib.contextmanager
    def cut(self, *services: str) -> Iterator[None]:
        """No packet comes or goes meanwhile."""
        for service in services:
            _ip("link", "set", self.links[service], "down")
        try:
            yield
        finally:
            for service in services:
                _ip("link", "set", self.links[service], "up")


@contextlib.contextmanager
def namespace(env: Mapping[str, str]) -> Iterator[Namespace]:
    """A namespace for a worker of the stack that has this environment. Raises `Impossible`."""
    if os.geteuid() != 0:
        raise Impossible("network namespaces need root")
    mark = secrets.token_hex(3)
    name = f"chaos-{mark}"
    ports = {
        "postgres": urlsplit(env["TIDEGATE_DATABASE_URL"]).port,
        "redis": urlsplit(env["TIDEGATE_REDIS_URL"]).port,
        "triton": int(env["TIDEGATE_TRITON_URL"].rpartition(":")[2]),
    }
    links: dict[str, str] = {}
    forwarders: list[Forwarder] = []
    seen = dict(env)
    with contextlib.ExitStack() as undo:
        try:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
            subnet = secrets.randbelow(64) * 4
            for place, service in enumerate(SERVICES):
                near, far = f"c{mark}{place}", f"d{mark}{place}"
                us, them = f"10.213.{subnet + place}.1", f"10.213.{subnet + place}.2"
                _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
                _ip("addr", "add", f"{us}/30", "dev", near)
                _ip("link", "set", near, "up")
                _ip("-n", name, "addr", "add", f"{them}/30", "dev", far)
                _ip("-n", name, "link", "set", far, "up")
                port = ports[service]
                assert port is not None
                forwarders.append(Forwarder(us, port))
                undo.callback(forwarders[-1].close)
                links[service] = near
                for variable in _VARIABLES[service]:
                    seen[variable] = seen[variable].replace(f"{HOST}:{port}", f"{us}:{port}")
        except OSError as error:
            raise Impossible(f"a network namespace: {error}") from error
        yield Namespace(name, links, {name: seen[name] for name in seen.keys() & env.keys()})


_VARIABLES = {
    "postgres": ("TIDEGATE_DATABASE_URL",),
    "redis": ("TIDEGATE_REDIS_URL",),
    "triton": ("TIDEGATE_TRITON_URL",),
}
