"""What tenants may have us call, and what not, however it is written."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadRequest, Forbidden
from tasks.egress import MAX_URL, Target, parse, permitted, public

INSIDE_V4 = st.sampled_from(
    [
        IPv4Network(text)
        for text in (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "224.0.0.0/4",
            "240.0.0.0/4",
        )
    ]
).flatmap(lambda network: st.ip_addresses(v=4, network=network))
EMBEDDINGS = {
    "mapped": IPv6Network("::ffff:0:0/96"),
    "compatible": IPv6Network("::/96"),
    "translated": IPv6Network("::ffff:0:0:0/96"),
    "nat64": IPv6Network("64:ff9b::/96"),
    "local nat64": IPv6Network("64:ff9b:1::/96"),
}


@given(st.ip_addresses())
def test_nothing_is_public_that_the_standard_library_knows_not_to_be(
    address: IPv4Address | IPv6Address,
) -> None:
    if not address.is_global or address.is_multicast:
        assert not public(address)


@given(st.ip_addresses(v=6))
def test_most_of_ipv6_is_not_handed_out_and_not_public(address: IPv6Address) -> None:
    if public(address):
        assert address in IPv6Network("2000::/3") or address in IPv6Network("64:ff9b::/96")


@given(INSIDE_V4)
def test_an_inside_address_stays_one(address: IPv4Address) -> None:
    assert not public(address)


@pytest.mark.parametrize("kind", EMBEDDINGS)
@given(address=INSIDE_V4)
def test_an_inside_address_hides_in_no_ipv6_address(kind: str, address: IPv4Address) -> None:
    hidden = IPv6Address(int(EMBEDDINGS[kind].network_address) | int(address))
    assert not public(hidden)


@given(INSIDE_V4, st.integers(0, 2**80 - 1))
def test_an_inside_address_hides_in_no_tunnel(address: IPv4Address, rest: int) -> None:
    six_to_four = 0x2002 << 112 | int(address) << 80 | rest
    teredo = 0x20010000 << 96 | (rest & (2**64 - 1)) << 32 | (int(address) ^ 0xFFFFFFFF)
    assert not public(IPv6Address(six_to_four))
    assert not public(IPv6Address(teredo))


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::808:808"],
)
def test_servers_on_the_internet_are_public(text: str) -> None:
    assert public(ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "169.254.169.254",  # metadata of nearly everybody
        "168.63.129.16",  # of Azure
        "100.100.100.200",  # of Alibaba
        "fd00:ec2::254",  # of AWS by IPv6
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "2001:db8::1",
        "255.255.255.255",
    ],
)
def test_known_inside_addresses_are_not(text: str) -> None:
    assert not public(ip_address(text))


# URLs


def test_a_url_says_where_to_connect_and_what_to_ask_for() -> None:
    assert parse("https://Hooks.Example.com/a/b?c=d%20e") == Target(
        True, "hooks.example.com", 443, "/a/b?c=d%20e"
    )
    assert parse("https://hooks.example.com:8443").authority == "hooks.example.com:8443"
    assert parse("https://[2606:4700::1111]/").authority == "[2606:4700::1111]"
    assert parse("https://8.8.8.8/").authority == "8.8.8.8"


def forms(address: IPv4Address) -> list[str]:
    """Ways to write an address that one reader or another takes for it."""
    number, parts = int(address), str(address).split(".")
    return [
        str(address),
        f"{address}.",
        str(number),
        hex(number),
        f"0{number:o}",
        ".".join(hex(int(part)) for part in parts),
        ".".join(f"0{int(part):o}" for part in parts),
        ".".join(f"{int(part):03}" for part in parts),
        f"{parts[0]}.{number & 0xFFFFFF}",
        f"{parts[0]}.{parts[1]}.{number & 0xFFFF}",
        f"[::ffff:{address}]",
        f"[::{address}]",
        f"[64:ff9b::{address}]",
        str(address).replace(".", "。"),
        "".join(f"%{ord(letter):02x}" for letter in str(address)),
    ]


@given(INSIDE_V4)
def test_an_inside_address_is_refused_in_every_form(address: IPv4Address) -> None:
    for form in forms(address):
        with pytest.raises(BadRequest, match="url"):
            parse(f"https://{form}/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com",
        "//hooks.example.com/",
        "https:///path",
        "http://hooks.example.com/",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "gopher://hooks.example.com/",
        "javascript:alert(1)",
        "https://user:password@hooks.example.com/",
        "https://user@hooks.example.com/",
        "https://8.8.8.8@127.0.0.1/",
        "https://hooks.example.com\\@127.0.0.1/",
        "https://hooks.example.com/\r\nX-Injected: 1",
        "https://hooks.example.com/a b",
        "https://hooks.example.com/\t",
        "https://hooks.example.com/\0",
        "https://hooks.example.com/#fragment",
        "https://höks.example.com/",
        "https://hooks..example.com/",
        "https://-hooks.example.com/",
        "https://hooks.example.com:0/",
        "https://hooks.example.com:22/",
        "https://hooks.example.com:25/",
        "https://hooks.example.com:65536/",
        "https://hooks.example.com:http/",
        "https://[::1]/",
        "https://[fe80::1%25eth0]/",
        "https://[hooks.example.com]/",
        "https://localhost/",
        "https://anything.localhost/",
        "https://metadata.google.internal/",
        "https://printer.local/",
        "https://postgres/",
        "https://hooks.example.com/" + "a" * MAX_URL,
        "https://" + "a" * 64 + ".example.com/",
    ],
)
def test_a_url_we_would_never_call_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="url"):
        parse(url)


def test_for_development_http_and_private_hosts_pass_and_nothing_else() -> None:
    assert parse("http://127.0.0.1:8000/x", insecure=True) == Target(False, "127.0.0.1", 8000, "/x")
    assert parse("http://receiver/", insecure=True).authority == "receiver"
    for url in (
        "http://user@receiver/",
        "file:///etc/passwd",
        "http://receiver/\r\n",
        "http://2130706433/",
    ):
        with pytest.raises(BadRequest):
            parse(url, insecure=True)


@given(st.text(max_size=60))
def test_any_text_is_a_target_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://hooks.example.com{text}"):
        for insecure in (False, True):
            try:
                target = parse(url, insecure=insecure)
            except BadRequest:
                continue
            assert target.host
            assert target.path.startswith("/")
            assert not set("\r\n \0") & set(target.path + target.authority)


# Addresses of a name


def test_one_inside_address_among_public_ones_refuses_them_all() -> None:
    assert permitted(["8.8.8.8", "2606:4700::1111"]) == [
        ip_address("8.8.8.8"),
        ip_address("2606:4700::1111"),
    ]
    for inside in ("127.0.0.1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "169.254.169.254"):
        with pytest.raises(Forbidden, match="not public") as caught:
            permitted(["8.8.8.8", inside])
        assert inside not in caught.value.message
    assert permitted(["127.0.0.1"], insecure=True) == [ip_address("127.0.0.1")]
