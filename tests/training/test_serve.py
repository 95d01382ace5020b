"""`hsvlt serve`: the answers of the pipeline over HTTP, in batches, and what a client may not do to it."""

import asyncio
import base64
import http.client
import io
import json
import re
import select
import socket
import sys
import threading
import time
import urllib.request
from contextlib import asynccontextmanager, suppress

import httpx2
import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from huggingface_hub import InferenceClient
from PIL import Image

from modeling_hsvlt import MultiLabelImageClassificationPipeline, MultiLabelImageProcessor
from training.serve import ServeOptions, main
from training.tagging import server as serving

from ..forked import SERVER, free_port
from .tiny_checkpoint import NAMES, save_checkpoint, tiny_model


def photo(seed=0, size=(20, 30)):
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def as_text(image):
    return base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def tagger():
    processor = MultiLabelImageProcessor(size={"height": 16, "width": 16})
    return MultiLabelImageClassificationPipeline(model=tiny_model(), image_processor=processor)


@pytest.fixture(scope="module")
def client(tagger):
    with TestClient(serving.build_app(tagger, ServeOptions(max_pixels=10_000, max_bytes=100_000))) as client:
        yield client


@pytest.fixture
def forwards(tagger, monkeypatch):
    """The sizes of the batches that the model was given."""
    sizes, forward = [], tagger.model.forward

    def counted(*args, **kwargs):
        sizes.append(len(kwargs["pixel_values"]))
        return forward(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(tagger.model, "forward", counted)
    return sizes


@asynccontextmanager
async def running(tagger, **options):
    """The application without a network, its queue at work."""
    app = serving.build_app(tagger, ServeOptions(**options))
    async with app.router.lifespan_context(app):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def same_labels(found, expected):
    assert [label["label"] for label in found] == [label["label"] for label in expected]
    np.testing.assert_allclose([a["score"] for a in found], [b["score"] for b in expected], atol=1e-5)
    return True


@pytest.mark.parametrize("parameters", [{}, {"threshold": 0.5}, {"top_k": 1}, {"labels": ["cat", "dog"]}])
def test_the_answer_is_the_pipelines(client, tagger, parameters):
    expected = tagger(photo(), **parameters)
    sent = json.dumps(parameters)
    answers = [
        client.post("/predict", files={"image": photo()}, data={"parameters": sent}),
        client.post("/predict", json={"inputs": as_text(photo()), "parameters": parameters}),
        client.post("/predict", json={"inputs": f"data:image/png;base64,{as_text(photo())}", "parameters": parameters}),
    ]
    assert all(answer.status_code == 200 and same_labels(answer.json(), expected) for answer in answers)


def test_the_hubs_own_client_is_answered(address, tagger):
    """It sends a file as it is, bytes without a type, and JSON where there are parameters."""
    url = "http://{}:{}/predict".format(*address)
    expected = tagger(photo())
    for parameters in ({}, {"top_k": 2}):
        found = InferenceClient(model=url).image_classification(photo(), **parameters)
        same_labels(found, expected[: parameters.get("top_k")])
    sent = urllib.request.Request(url, photo(), {"Content-Type": "image/png"})
    same_labels(json.load(urllib.request.urlopen(sent)), expected)


def test_a_list_gives_a_list(client, tagger):
    photos = [photo(seed) for seed in range(3)]
    for count in (0, 1, 3):
        answer = client.post("/predict", json={"inputs": [as_text(image) for image in photos[:count]]}).json()
        assert len(answer) == count and all(map(same_labels, answer, tagger(photos[:count])))
    files = [("images", image) for image in photos]
    for count in (1, 3):
        answer = client.post("/predict", files=files[:count]).json()
        assert len(answer) == count and all(map(same_labels, answer, tagger(photos[:count])))


def test_a_heat_map_is_a_png(client, tagger):
    parameters = {"explain": True, "labels": ["cat"]}
    (label,) = client.post("/predict", json={"inputs": as_text(photo()), "parameters": parameters}).json()
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(label["heat_map"])))) / 255
    assert abs(drawn - tagger(photo(), **parameters)[0]["heat_map"]).max() < 0.003


def test_what_arrives_while_it_waits_is_one_forward_pass(tagger, forwards):
    """Twelve requests with parameters of their own, of which the last comes when the others have all been read."""

    async def send(client, seed):
        parameters = [{}, {"threshold": 0.5}, {"top_k": 2}][seed % 3]
        answer = await client.post("/predict", json={"inputs": as_text(photo(seed)), "parameters": parameters})
        return answer.json(), parameters

    async def all_of_them():
        async with running(tagger, batch_size=12, wait_ms=300_000) as client:
            first = [asyncio.create_task(send(client, seed)) for seed in range(11)]
            while client._transport.app.state.server.taken < 11:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in first)
            return await asyncio.gather(*first, send(client, 11))

    answers = asyncio.run(all_of_them())
    assert forwards == [12]
    for seed, (answer, parameters) in enumerate(answers):
        same_labels(answer, tagger(photo(seed), **parameters))


def test_a_batch_has_a_limit_and_nobody_waits_longer_than_said(tagger, forwards):
    async def five():
        async with running(tagger, batch_size=3, wait_ms=1) as client:
            return await client.post("/predict", json={"inputs": [as_text(photo(seed)) for seed in range(5)]})

    assert asyncio.run(five()).status_code == 200
    assert sum(forwards) == 5 and max(forwards) <= 3


def test_what_cannot_be_computed_together_is_not(tagger, forwards):
    async def both():
        async with running(tagger, batch_size=3, wait_ms=300_000) as client:
            requests = [{}, {"labels": ["cat"]}, {"explain": True}]
            sent = [client.post("/predict", json={"inputs": as_text(photo()), "parameters": p}) for p in requests]
            return [(answer.json(), p) for answer, p in zip(await asyncio.gather(*sent), requests, strict=True)]

    answers = asyncio.run(both())
    assert sorted(forwards) == [1, 1, 1]
    for answer, parameters in answers:
        same_labels(answer, tagger(photo(), **parameters))


def refused(answer, status, words):
    assert answer.status_code == status and re.search(words, answer.json()["detail"]), answer.text
    assert "\n" not in answer.json()["detail"] and "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": as_text(photo(size=(200, 100)))}, 422, "more than the limit of 10000"),
        ({"inputs": "A" * 100_001}, 413, "longer than 100000 bytes"),
        ({"inputs": [as_text(photo())] * 129}, 413, "longer than|more than the 128"),
        ({"inputs": [""] * 129}, 413, "129 images are more than the 128"),
        ({"inputs": "/etc/passwd"}, 422, "neither base64 nor an address"),
        ({"inputs": "photo.jpg"}, 422, "neither base64 nor an address"),
        ({"inputs": "http://example.org/a.png"}, 422, "Addresses are not read here"),
        ({"inputs": [as_text(photo()), as_text(photo()[:60])]}, 422, "Image 2 of 2: "),
        ({"inputs": as_text(photo()), "parameters": {"limit": 1}}, 422, "Unknown parameter limit"),
        ({"inputs": as_text(photo()), "parameters": {"threshold": 2}}, 422, "threshold must be"),
        ({"inputs": as_text(photo()), "parameters": {"labels": ["cow"]}}, 422, "no label 'cow'"),
        ({"image": as_text(photo())}, 422, 'needs "inputs"'),
        ([], 422, 'needs "inputs"'),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(client, body, status, words):
    refused(client.post("/predict", json=body), status, words)
    same = client.post("/predict", json={"inputs": as_text(photo())})
    assert same.status_code == 200 and client.app.state.server.taken == 0


def test_bodies_that_cannot_be_read(client):
    def post(content, kind):
        return client.post("/predict", content=content, headers={"Content-Type": kind})

    refused(post(b"{", "application/json"), 422, "The request is no JSON")
    refused(post(b"[" * 50_000, "application/json"), 422, "The request is no JSON")
    refused(post(b"\xff\xfe{", "application/json"), 422, "The request is no JSON")
    refused(post(rb'{"inputs": "", "\ud800": 1}', "application/json"), 422, r"this one has \\ud800")
    refused(post(photo(), "text/plain"), 415, "multipart/form-data with a file `image`")
    refused(post(b"", "image/png"), 422, "no image format")
    refused(post(b"x", "multipart/form-data"), 400, "boundary")
    upload = client.post
    refused(upload("/predict", files={"image": photo()}, data={"parameters": "{"}), 422, "parameters is no JSON")
    refused(upload("/predict", files={"photo": photo()}), 422, "this one has photo")
    refused(upload("/predict", files={"other": b""}, data={"image": "text"}), 422, "this one has")
    refused(upload("/predict", files=[("image", photo()), ("image", photo())]), 422, "one file `image`")
    refused(upload("/predict", files={"image": b"\0" * 100_001}), 413, "longer than 100000 bytes")
    refused(upload("/predict", files={"image": b"no image"}), 422, "no image format")


def test_json_is_parsed_one_at_a_time(tagger, monkeypatch):
    """It can take thirty times its bytes: side by side a few requests would fill the memory."""
    alive, most, parse = 0, 0, serving._parse

    def counted(*arguments):
        nonlocal alive, most
        alive, most = alive + 1, max(most, alive + 1)
        time.sleep(0.02)
        alive -= 1
        return parse(*arguments)

    async def six():
        async with running(tagger) as client:
            bodies = [as_text(photo()), [as_text(photo()), [{}] * 9]] * 3
            return await asyncio.gather(*(client.post("/predict", json={"inputs": body}) for body in bodies))

    monkeypatch.setattr(serving, "_parse", counted)
    answers = asyncio.run(six())
    assert [answer.status_code for answer in answers] == [200, 422] * 3 and most == 1
    refused(answers[1], 422, "this is of type list")


def test_addresses_are_read_where_that_was_said(tagger, monkeypatch):
    asked = []

    def fetched(url, **limits):
        asked.append((url, limits["max_bytes"], limits["allow_private"]))
        return photo()

    with TestClient(serving.build_app(tagger, ServeOptions(allow_urls=True, max_bytes=5000))) as client:
        private = client.post("/predict", json={"inputs": "http://127.0.0.1/a.png"})
        refused(private, 422, "not on the public internet")
        monkeypatch.setattr(sys.modules["modeling_hsvlt.load_image"], "fetch_image", fetched)
        answer = client.post("/predict", json={"inputs": "https://example.org/a.png"})
    assert same_labels(answer.json(), tagger(photo())) and asked == [("https://example.org/a.png", 5000, False)]


def test_a_full_queue_says_when_to_come_again(tagger, monkeypatch):
    """Two places, and a model that waits until it is let go."""
    go, forward = threading.Event(), tagger.forward
    monkeypatch.setattr(tagger, "forward", lambda *args, **kwargs: go.wait(20) and forward(*args, **kwargs))

    async def three():
        async with running(tagger, max_queue=2) as client:
            body = {"inputs": as_text(photo())}
            taken = [asyncio.create_task(client.post("/predict", json=body)) for _ in range(2)]
            while client._transport.app.state.server.taken < 2:
                await asyncio.sleep(0.01)
            full = await client.post("/predict", json=body)
            go.set()
            answers = [await task for task in taken]
            return full, answers, await client.post("/predict", json={"inputs": [body["inputs"]] * 2})

    full, answers, after = asyncio.run(three())
    refused(full, 503, "come again")
    assert int(full.headers["Retry-After"]) >= 1
    assert [answer.status_code for answer in (*answers, after)] == [200, 200, 200]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("scores are no numbers")])
def test_a_model_that_fails_ends_the_requests_and_not_the_server(tagger, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    with TestClient(serving.build_app(tagger, ServeOptions()), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr(tagger, "forward", broken)
            refused(client.post("/predict", json={"inputs": as_text(photo())}), 500, "its log says why")
        assert client.post("/predict", json={"inputs": as_text(photo())}).status_code == 200
        assert 'hsvlt_errors_total{status="500"} 1.0' in client.get("/metrics").text


def test_health_and_metrics(tagger):
    app = serving.build_app(tagger, ServeOptions(max_pixels=10_000))
    before = TestClient(app)
    assert before.get("/health").status_code == 503
    refused(before.post("/predict", json={"inputs": as_text(photo())}), 503, "Not ready")
    with TestClient(app) as client:
        assert client.get("/health").json() == {"status": "ready"}
        assert client.head("/health").status_code == 200
        for inputs in ([as_text(photo())] * 3, "no"):
            client.post("/predict", json={"inputs": inputs})
        client.get("/elsewhere/1")
        text = client.get("/metrics").text
    assert TestClient(app).get("/health").status_code == 503
    for line in (
        'hsvlt_requests_total{path="/predict",status="200"} 1.0',
        'hsvlt_requests_total{path="/predict",status="422"} 1.0',
        'hsvlt_requests_total{path="other",status="404"} 1.0',
        'hsvlt_errors_total{status="422"} 1.0',
        "hsvlt_images_total 3.0",
        "hsvlt_batch_size_sum 3.0",
        "hsvlt_request_seconds_bucket",
        "hsvlt_images_taken 0.0",
    ):
        assert line in text, line


def test_the_page_of_the_interface(client):
    page = client.get("/docs").text
    assert "url: 'openapi.json'" in page
    # Where its script does not come, it is no blank page.
    assert re.search(r'id="swagger-ui"><p>.*href="openapi.json".*curl -F .*/predict</pre>', page, re.S)
    operation = client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data", "image/*"}
    assert {"200", "400", "413", "422", "503"} <= set(operation["responses"])


@pytest.fixture
def address(tagger):
    """A real server in a thread, that gives a client half a second; its host and port."""
    options, listener = ServeOptions(timeout=0.5), serving.listen("127.0.0.1", 0)
    server = uvicorn.Server(serving.server_config(serving.build_app(tagger, options), options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


HEAD = b" HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"POST /predict HTTP/1.1\r\nHost:", b""),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health", b"HTTP/1.1 200"),
        (b"POST /predict" + HEAD + b"99\r\n\r\n{", b" 408 "),
        # Answered before the body is there, which may be one that never ends.
        (b"POST /elsewhere" + HEAD + b"99\r\n\r\n{", b" 404 "),
        (b"POST /health" + HEAD + b"99\r\n\r\n{", b" 405 "),
        (b"GET /health" + HEAD + b"99\r\n\r\n{", b" 200 "),
        (b"POST /elsewhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", b" 404 "),
        (b"POST /predict" + HEAD + b"99999999999\r\n\r\n{", b" 413 "),
        (b"POST /predict" + HEAD + b"99999999999\r\nExpect: 100-continue\r\n\r\n", b"HTTP/1.1 413 "),
    ],
    ids=[
        *("nothing", "half a head", "a second head", "half a body", "half a body for nobody", "for another method"),
        *("for a GET", "in chunks", "announced as too long", "announced, and not sent"),
    ],
)
def test_a_slow_client_is_let_go(address, sent, answer):
    """Also one that goes on sending a byte now and then."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        began, received = time.monotonic(), b""
        while True:  # until the server closes
            assert time.monotonic() - began < 9
            if select.select([connection], [], [], 0.1)[0]:
                if not (data := connection.recv(65536)):
                    break
                received += data
            elif b"Content-Length" in sent and b"Expect" not in sent:
                with suppress(OSError):
                    connection.sendall(b" ")
    assert answer in received and (answer or not received)


@pytest.mark.parametrize(("path", "status"), [("/predict", 413), ("/elsewhere", 404)])
def test_who_reads_when_all_is_sent_sees_the_answer(address, path, status):
    """Closed before that, the client would see a reset connection and not the reason."""
    client = http.client.HTTPConnection(*address, timeout=10)
    body = b" " * (3 * ServeOptions().max_bytes)
    client.request("POST", path, body, {"Content-Type": "application/json"})
    assert client.getresponse().status == status
    client.close()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere/at/all"], "is no folder"),
        (["x", "--batch_size", "0"], "batch_size must be above 0"),
        (["x", "--port", "70000"], "port must be from 0"),
        (["CHECKPOINT", "--port", "TAKEN"], "choose another --host or --port"),
        ([], "There is no run below runs/"),
    ],
)
def test_what_cannot_be_served_is_said(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"CHECKPOINT": str(tmp_path / "checkpoint"), "TAKEN": str(taken.getsockname()[1])}
        if "CHECKPOINT" in argv:
            save_checkpoint(tmp_path / "checkpoint")
            capsys.readouterr()
        assert main([names.get(word, word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_answer_in_two_pieces_does_not_wait_for_an_acknowledgement():
    """The second piece of it would, for 40 ms, with a client that keeps its connection."""
    with serving.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_one_thread_alone_computes_on_several_cores(tagger):
    """More OpenMP threads than cores slow each other down, and every thread that computes keeps its own."""
    before = torch.get_num_threads()
    try:
        app = serving.build_app(tagger, ServeOptions(), threads=3)
        server = app.state.server
        pools = {"model": server.model_thread, "decoder": server.decoders, "download": server.downloads}

        def number(name):
            return pools[name].submit(lambda: torch.ones(300, 300).exp() is not None and torch.get_num_threads())

        assert number("decoder").result() == 1
        assert number("model").result() == 3
        assert number("decoder").result() == number("download").result() == 1
    finally:
        torch.set_num_threads(before)


def serve(arguments):
    sys.exit(main(arguments))


def test_sigterm_ends_it_when_what_it_took_is_answered(tmp_path):
    """A process of its own. One image waits for a second one, of which half has come when the signal does."""
    save_checkpoint(tmp_path / "checkpoint")
    host = f"127.0.0.1:{free_port()}"
    options = ["--port", host.partition(":")[2], "--batch_size", "2", "--wait_ms", "1000000", "--timeout", "500"]
    body = json.dumps({"inputs": as_text(photo())}).encode()
    process = SERVER.Process(target=serve, args=([str(tmp_path / "checkpoint"), *options],))
    process.start()
    try:
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(host.split(":"), timeout=1):
                break
            assert process.is_alive()
            time.sleep(0.02)
        clients = [http.client.HTTPConnection(host, timeout=500) for _ in range(2)]
        for client in clients:
            client.putrequest("POST", "/predict")
            client.putheader("Content-Type", "application/json")
            client.putheader("Content-Length", str(len(body)))
            client.endheaders(body[:50])
        clients[0].send(body[50:])
        assert json.load(urllib.request.urlopen(f"http://{host}/health")) == {"status": "ready"}
        while "hsvlt_images_taken 2.0" not in urllib.request.urlopen(f"http://{host}/metrics").read().decode():
            time.sleep(0.02)
        process.terminate()
        time.sleep(0.5)
        clients[1].send(body[50:])
        for client in clients:
            assert {label["label"] for label in json.load(client.getresponse())} == set(NAMES)
            client.close()
        process.join(300)
        assert process.exitcode == 0
    finally:
        process.kill()
