"""Images by URL, for programs that are given addresses by strangers.

Who may name a URL may name the inside of a network: `http://169.254.169.254/`, a router, a database without password.
So an address that does not belong to the public internet is refused, wherever it comes from: the URL, the name's DNS
entry, or a redirect. The connection is made to the very address that was looked at, since a second look-up could answer
otherwise. One deadline holds for all of it, and one limit for the bytes.

A checkpoint carries this file, so it imports nothing of this package.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address
# IANA's special-purpose registries as of 2026, which Python's own list lags behind: what is not reachable from
# everywhere, or leads to a device nearby (192.0.0.0/24, 2001::/23 and 192.88.99.0/24 as a whole).
SPECIAL_IPV4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
]
UNICAST_IPV6 = ipaddress.ip_network("2000::/3")  # all that was ever given out
SPECIAL_IPV6 = ["2001::/23", "2001:db8::/32", "3fff::/20"]
_SPECIAL = [ipaddress.ip_network(network) for network in (*SPECIAL_IPV4, *SPECIAL_IPV6)]


def fetch_image(url: str, *, timeout: float | None, max_bytes: int | None, allow_private: bool = False) -> bytes:
    """The body at an http or https URL. Proxies of the environment are not used: they would hide where it leads.

    Args:
        timeout: Seconds for everything from the first connection to the last byte; None waits for ever. (Only the
            look-up of a name has its own limit, the system's.)
        max_bytes: The longest body to read.
        allow_private: Whether addresses inside a network (and of this computer) may be read.

    Raises:
        OSError, http.client.HTTPException, ValueError: with the reason.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"it leads to {parts.scheme or 'no'}:, and only http: and https: are read")
        status, location, body = _get(parts, deadline, timeout, max_bytes, allow_private)
        if status in (301, 302, 303, 307, 308) and location:
            url = urljoin(url, location)
            continue
        if status != 200:
            raise OSError(f"the server answers {status} {http.client.responses.get(status, '')}".rstrip())
        if max_bytes is not None and len(body) > max_bytes:
            raise ValueError(f"it is longer than the limit of {max_bytes} bytes")
        return body
    raise OSError(f"it is redirected more than {MAX_REDIRECTS} times")


def _get(parts, deadline, timeout, max_bytes, allow_private) -> tuple[int, str | None, bytes]:
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    opened: list[Any] = [_connect(parts.hostname, port, deadline, allow_private)]
    late = threading.Event()

    def give_up() -> None:  # a server that sends a byte a second never runs into the timeout of a read
        late.set()
        with contextlib.suppress(OSError):
            opened[-1].shutdown(socket.SHUT_RDWR)

    timer = None
    if deadline is not None:
        timer = threading.Timer(max(deadline - time.monotonic(), 0.001), give_up)
        timer.daemon = True
        timer.start()
    try:
        if secure:
            context = ssl.create_default_context()
            opened.append(context.wrap_socket(opened[0], server_hostname=parts.hostname, do_handshake_on_connect=False))
            opened[-1].do_handshake()
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname, port)
        connection.sock = opened[-1]  # http.client connects only where there is no socket yet
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "load_image", "Accept": "image/*"})
        response = connection.getresponse()
        body = b"" if response.status != 200 else response.read(*(() if max_bytes is None else (max_bytes + 1,)))
        if late.is_set():
            raise TimeoutError
        return response.status, response.headers.get("Location"), body
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or isinstance(error, TimeoutError):
            raise TimeoutError(f"it took longer than {timeout:g} seconds") from error
        raise
    finally:
        if timer is not None:
            timer.cancel()
        opened[-1].close()


def _connect(host: str, port: int, deadline: float | None, allow_private: bool) -> socket.socket:
    """Connects to the first address that answers; each has an equal share of the time that is left."""
    problem: OSError = OSError(f"{host} has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(found):
        if not (allow_private or is_public(str(address[0]))):
            problem = PermissionError(
                f"{host} is {address[0]}, which is not on the public internet; if that is meant, pass "
                "allow_private_addresses=True"
            )
            continue
        try:
            connection = socket.socket(family, kind, protocol)
            if deadline is not None:
                connection.settimeout(max((deadline - time.monotonic()) / (len(found) - number), 0.001))
            connection.connect(address)
            connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
            return connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it is an IPv4 address in the clothes of IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
        if ip not in UNICAST_IPV6:
            return False
    return not any(ip in network for network in _SPECIAL)
