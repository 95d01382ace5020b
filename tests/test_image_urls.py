"""Addresses that strangers give: what leads inside a network, never ends or is too long is refused."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modeling_hsvlt import image_urls
from modeling_hsvlt.image_urls import fetch_image, is_public
from modeling_hsvlt.load_image import load_image


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.1.1", "172.16.0.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "2002:7f00:1::", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1",
    ],
)  # fmt: skip
def test_addresses_inside_a_network_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are(address):
    assert is_public(address)


class Site(BaseHTTPRequestHandler):
    """Attacks by path."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        location = {"/loop": "/loop", "/file": "file:///etc/passwd", "/inside": "http://10.0.0.1/", "/once": "/image"}
        self.send_response(302 if self.path in location else 200)
        if self.path in location:
            self.send_header("Location", location[self.path])
        self.end_headers()
        if self.path == "/drip":  # one byte at a time, each well within the timeout of a read
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/endless":
            for _ in range(1000):
                self.wfile.write(b"x" * 65536)
        else:
            self.wfile.write(b"the image")

    def handle(self):
        with contextlib.suppress(OSError):  # the client hung up, as it should
            super().handle()


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(site, path, **options):
    url = f"http://127.0.0.1:{site.server_port}{path}"
    return fetch_image(url, **{"timeout": 10, "max_bytes": 1000, "allow_private": True, **options})


def test_a_body_and_a_redirect_are_followed(site):
    assert fetch(site, "/image?size=2") == b"the image" and site.asked[-1] == "/image?size=2"
    assert fetch(site, "/once") == b"the image"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/loop", "redirected more than 5 times"),
        ("/file", "leads to file:, and only http: and https: are read"),
        ("/endless", "longer than the limit of 1000 bytes"),
    ],
)
def test_what_a_hostile_site_answers_is_refused(site, path, message):
    with pytest.raises((OSError, ValueError), match=message):
        fetch(site, path)


def test_a_site_that_drips_ends_at_the_deadline(site):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took longer than 0\.3 seconds"):
        fetch(site, "/drip", timeout=0.3)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "127.1"])
def test_this_computer_is_not_even_asked_unless_told(site, host):
    asked = len(site.asked)
    with pytest.raises(ValueError, match=r"not on the public internet; .*allow_private_addresses=True"):
        load_image(f"http://{host}:{site.server_port}/image")
    assert len(site.asked) == asked


def test_a_name_that_leads_inside_is_refused_at_the_address_that_is_connected_to(site, monkeypatch):
    """DNS that answers a public address first and a private one when asked again (rebinding), and the reverse."""
    answers, connected = [], []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(socket.AF_INET, 1, 6, "", answers.pop(0))])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connected.append(address))
    answers[:] = [("93.184.216.34", 80), ("10.0.0.1", 80)]
    image_urls._connect("example.org", 80, 1.0, False).close()
    assert connected == [("93.184.216.34", 80)] and len(answers) == 1, "looked up once, and that is connected to"
    with pytest.raises(PermissionError, match=r"example.org is 10\.0\.0\.1"):
        image_urls._connect("example.org", 80, 1.0, False)
    assert len(connected) == 1


def test_a_redirect_from_outside_to_inside_is_refused(site, monkeypatch):
    plain = image_urls._connect
    # The first address counts as public, as a stranger's server would be.
    monkeypatch.setattr(
        image_urls, "_connect", lambda host, port, left, allow: plain(host, port, left, host == "127.0.0.1")
    )
    with pytest.raises(PermissionError, match=r"10\.0\.0\.1, which is not on the public internet"):
        fetch(site, "/inside", allow_private=False)


@pytest.mark.parametrize("url", ["http://", "http:///x", "https://[::1", "http://a b/", "http://x:99999/"])
def test_what_is_no_address_is_told(url):
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_image(url)
