"""The guard of what tenants have us call: https only, and public addresses only.

A URL is checked by its letters when it is registered (`parse`), and by what its name resolves to
each time something is sent (`permitted`); the connection then goes to the very address that was
checked, so a name that changes its mind in between reaches nothing. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from errors import BadRequest, Forbidden

Address = IPv4Address | IPv6Address

MAX_URL = 2048
_PRINTABLE = re.compile(r"[!-~]+")
_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_INSIDE = ("localhost", "local", "internal", "lan", "home", "corp", "intranet", "arpa")
"""Last labels of names that no public server has."""

_NOT_PUBLIC_V4 = [
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's metadata, on a public-looking address
        "169.254.0.0/16",  # link-local: everybody else's metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
_GLOBAL_V6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NOT_PUBLIC_V6 = [
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarking
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
]


def public(address: Address) -> bool:
    """A server on the internet may have this address. Of IPv6 only what is handed out for that, and
    NAT64 of a public IPv4 address: networks without IPv4 see all others so."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if address in _NAT64:
        return public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _GLOBAL_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send: a URL that passed."""

    secure: bool
    host: str
    """A name, or an address without brackets."""
    port: int
    path: str
    """With the query."""

    @property
    def authority(self) -> str:
        """The `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse(url: str, *, insecure: bool = False) -> Target:
    """Raises `BadRequest` for a URL we would never call."""
    if len(url) > MAX_URL:
        raise BadRequest(f"url: longer than {MAX_URL} characters")
    # Nothing that two readers could read differently: no spaces, controls, backslashes, or letters
    # beyond ASCII.
    if not _PRINTABLE.fullmatch(url) or "\\" in url:
        raise BadRequest("url: printable ASCII only; write other letters in punycode and %XX")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadRequest(f"url: {error}") from None
    if parts.scheme not in ("https", "http") or (parts.scheme == "http" and not insecure):
        raise BadRequest("url: must begin with https://")
    if "@" in parts.netloc:
        raise BadRequest("url: must hold no user name or password")
    if "#" in url:
        raise BadRequest("url: must hold no fragment")
    secure = parts.scheme == "https"
    port = (443 if secure else 80) if port is None else port
    # Low ports belong to other protocols, whose servers are not to be spoken to from here.
    if not (port > 0 if insecure else port == 443 or port >= 1024):
        raise BadRequest("url: the port must be 443, or 1024 and above")
    host = _host(parts.hostname or "", insecure=insecure)
    path = parts.path or "/"
    return Target(secure, host, port, f"{path}?{parts.query}" if parts.query else path)


def _host(host: str, *, insecure: bool) -> str:
    last = host.rpartition(".")[2]
    if ":" in host or _NUMBER.fullmatch(last):
        # 127.1, 0x7f000001, 0177.0.0.1 and 2130706433 are addresses to some, and names to none.
        try:
            address = ip_address(host)
        except ValueError:
            raise BadRequest("url: the host is no address in its usual form") from None
        if getattr(address, "scope_id", None) or not (insecure or public(address)):
            raise BadRequest("url: the address is not public")
        return str(address)
    if not _NAME.fullmatch(host):
        raise BadRequest("url: the host is no name of a server")
    if not insecure and ("." not in host or last in _INSIDE):
        raise BadRequest("url: the host is not public")
    return host


def permitted(addresses: Sequence[str], *, insecure: bool = False) -> list[Address]:
    """What a name resolved to, if all of it may be called. Raises `Forbidden`: one inside address
    among public ones is an attempt, not an accident."""
    found = [ip_address(text.partition("%")[0]) for text in addresses]
    scoped = any("%" in text for text in addresses)
    if not insecure and (scoped or not all(public(address) for address in found)):
        raise Forbidden("the host's address is not public")
    return found
