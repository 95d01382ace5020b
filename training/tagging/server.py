"""The server behind `hsvlt serve`: requests are read side by side, and one thread runs the model on what is there."""

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata

import python_multipart  # noqa: F401  (Starlette asks for it at the first upload, we at the start)
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.pipeline_multilabel import MultiLabelImageClassificationPipeline

from ..checkpoint.loading import computing, load_checkpoint
from ..places import cores
from ..publish.handler import as_json, check_maps, image_source, read_request
from .http_guard import Guard, timed_protocol

DOWNLOADS = 16  # addresses that are read at a time; they mostly wait
LONGEST_ERROR = 500
SETTING_THREADS = threading.Lock()
IMAGE = {"type": "string", "description": "base64, or a data:image/ URL; an address with --allow_urls"}
FILE = {"type": "string", "format": "binary"}
PARAMETERS = {
    "threshold": {"description": '"auto", a number, one for each label, or one by name; none: every label'},
    "top_k": {"type": "integer", "minimum": 1},
    "labels": {"type": "array", "items": {"type": "string"}},
    "explain": {"type": "boolean", "description": "adds heat_map, a grey PNG in base64"},
}
BODIES = {
    "application/json": {
        "inputs": {"oneOf": [IMAGE, {"type": "array", "items": IMAGE}]},
        "parameters": {"type": "object", "properties": PARAMETERS},
    },
    "multipart/form-data": {
        "image": FILE,
        "images": {"type": "array", "items": FILE},
        "parameters": {"type": "string", "description": "the same as JSON"},
    },
}
SCHEMAS = {kind: {"type": "object", "properties": body} for kind, body in BODIES.items()} | {"image/*": FILE}
SCHEMAS["application/json"]["required"] = ["inputs"]
SCHEMAS["multipart/form-data"]["oneOf"] = [{"required": ["image"]}, {"required": ["images"]}]
REQUEST = {"content": {kind: {"schema": schema} for kind, schema in SCHEMAS.items()}}
# In the place that the script of the page fills.
WITHOUT_SCRIPT = """<p>This page is drawn by a script from the web, which has not come here. Without it:
<a href="openapi.json">openapi.json</a> describes the interface, and this is a request:</p>
<pre>curl -F image=@photo.jpg -F 'parameters={"threshold": "auto"}' ADDRESS/predict</pre>"""
RESPONSES = {
    400: {"description": "A body that is not what its head says."},
    200: {"description": "[{label, score}, ...] from the highest score on; of a list of images a list of these"},
    408: {"description": "The request came too slowly."},
    413: {"description": "Too many bytes or images."},
    415: {"description": "Neither an image, nor JSON or multipart."},
    422: {"description": "An image or a parameter is wrong; `detail` says what."},
    503: {"description": "Not ready, or too much to do; Retry-After says when to come again."},
}


def compute_with(count: int) -> None:
    """Operations of the thread that calls this use `count` cores, whatever other threads use.

    Every thread that computes on several cores keeps OpenMP threads of its own, and where a process has more of them
    than there are cores, GNU's OpenMP lets all sleep between operations: the model then takes up to twice as long.
    """
    with SETTING_THREADS:  # both lines write what the other threads start from
        torch.set_num_threads(count)
        torch.get_num_threads()  # a thread's first operation takes over the process's number; here it is this one


@dataclass
class Waiting:
    """An image whose turn has not come."""

    inputs: dict[str, torch.Tensor]
    forward: dict
    outputs: asyncio.Future

    def key(self) -> tuple:
        """What images must share to be computed together."""
        shapes = [(name, tuple(tensor.shape)) for name, tensor in self.inputs.items()]
        return repr(sorted(self.forward.items())), *shapes


class Server:
    """A pipeline, the queue in front of it, and what both count."""

    def __init__(self, tagger: MultiLabelImageClassificationPipeline, options, threads: int):
        self.tagger, self.options = tagger, options
        self.ready, self.taken = False, 0
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self.parsing = asyncio.Lock()
        self.model_thread = ThreadPoolExecutor(1, "model", compute_with, (threads,))
        self.decoders = ThreadPoolExecutor(cores(), "decoder", compute_with, (1,))
        self.downloads = ThreadPoolExecutor(DOWNLOADS, "download", compute_with, (1,))
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("hsvlt_requests", "Requests, by path and status", ["path", "status"], registry=registry)
        self.errors = Counter("hsvlt_errors", "Requests that were refused or failed", ["status"], registry=registry)
        self.images = Counter("hsvlt_images", "Images that were labelled", registry=registry)
        sizes = [2**power for power in range(options.batch_size.bit_length() + 1)]
        self.batches = Histogram("hsvlt_batch_size", "Images of a batch", buckets=sizes, registry=registry)
        self.seconds = Histogram("hsvlt_request_seconds", "From the head of a request to its answer", registry=registry)
        taken = Gauge("hsvlt_images_taken", "Images that are read, wait or are computed", registry=registry)
        taken.set_function(lambda: self.taken)

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Room for so many images, or 503."""
        if self.taken + count > self.options.max_queue:
            raise HTTPException(503, "Too much to do at the moment; come again.", {"Retry-After": "1"})
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    async def run_batches(self) -> None:
        """Takes what arrives within `wait_ms`, or has arrived meanwhile, until it is cancelled."""
        while True:
            batch = [await self.queue.get()]
            with suppress(TimeoutError):
                async with asyncio.timeout(self.options.wait_ms / 1000):
                    while len(batch) < self.options.batch_size:
                        batch.append(await self.queue.get())
            groups: dict[tuple, list[Waiting]] = {}
            for item in batch:
                groups.setdefault(item.key(), []).append(item)
            for group in groups.values():
                self.batches.observe(len(group))
                try:
                    outputs = await asyncio.get_running_loop().run_in_executor(self.model_thread, self.forward, group)
                except Exception as error:
                    for item in group:
                        if not item.outputs.done():
                            item.outputs.set_exception(error)
                    continue
                for place, item in enumerate(group):
                    if not item.outputs.done():
                        item.outputs.set_result({name: values[place : place + 1] for name, values in outputs.items()})

    def forward(self, group: list[Waiting]) -> Mapping[str, torch.Tensor]:
        inputs = {name: torch.cat([item.inputs[name] for item in group]) for name in group[0].inputs}
        try:
            return self.tagger.forward(inputs, **group[0].forward)
        except ValueError as error:  # no client's fault: what a request may be was looked at before
            raise RuntimeError("The model failed.") from error

    async def label(self, items: list, parameters: dict) -> list:
        """The labels of each image, as JSON."""
        preprocess, forward, postprocess = self.tagger._sanitize_parameters(**parameters)
        loop = asyncio.get_running_loop()

        def read(item) -> dict[str, torch.Tensor]:
            source = image_source(item, self.options.allow_urls)
            image = load_image(source, max_pixels=self.options.max_pixels, max_bytes=self.options.max_bytes)
            check_maps(self.tagger, image.size, parameters)
            return self.tagger.preprocess(image, **preprocess)

        async def label_one(place: int, item) -> list[dict]:
            try:
                threads = self.downloads if isinstance(item, str) and item.startswith("http") else self.decoders
                inputs = dict(await loop.run_in_executor(threads, read, item))
                waiting = Waiting(inputs, forward, loop.create_future())
                self.queue.put_nowait(waiting)
                outputs = await waiting.outputs
                self.images.inc()
                return await loop.run_in_executor(
                    self.decoders, lambda: as_json(self.tagger.postprocess(outputs, **postprocess))
                )
            except ValueError as error:
                raise ValueError(f"Image {place} of {len(items)}: {error}" if len(items) > 1 else error) from error

        # All are waited for, also behind one that is wrong: their places are taken until they are done.
        answers = await asyncio.gather(*map(label_one, range(1, len(items) + 1), items), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def build_app(tagger: MultiLabelImageClassificationPipeline, options, threads: int = 1) -> FastAPI:
    """The application that labels with `tagger` on so many cores; `options` is a `training.serve.ServeOptions`."""
    server = Server(tagger, options, threads)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        batches = asyncio.create_task(server.run_batches())
        server.ready = True
        batches.add_done_callback(lambda task: setattr(server, "ready", False))
        yield
        batches.cancel()  # uvicorn has waited for the requests
        for threads in (server.model_thread, server.decoders, server.downloads):
            threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="hsvlt", version=metadata.version("hsvlt"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(Guard, server=server)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "The server failed on this request; its log says why."}, 500)

    @app.post("/predict", responses=RESPONSES, openapi_extra={"requestBody": REQUEST})
    async def predict(request: Request) -> Response:
        """Labels of an image, or of each image of a list, as the pipeline gives them."""
        if not server.ready:
            raise HTTPException(503, "Not ready yet; come again.", {"Retry-After": "1"})
        try:
            with server.places(1):  # before the body is read
                inputs, parameters = await _read_body(request, server)
                items = inputs if isinstance(inputs, list) else [inputs]
                for item in items:
                    if not isinstance(item, (str, bytes)):
                        image_source(item)  # refuses it now, with whatever is in it
                if len(items) > options.max_queue:
                    raise HTTPException(413, f"{len(items)} images are more than the {options.max_queue} of a request.")
                with server.places(len(items) - 1 if items else 0):
                    answers = await server.label(items, parameters)
        except ValueError as error:
            words = " ".join(str(error).split())[:LONGEST_ERROR]
            raise HTTPException(422, words.encode("utf-8", "backslashreplace").decode()) from error  # half characters
        answer = await asyncio.to_thread(json.dumps, answers if isinstance(inputs, list) else answers[0])
        return Response(answer, media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page, place = (
            get_swagger_ui_html(openapi_url="openapi.json", title="hsvlt").body.decode(),
            '<div id="swagger-ui">',
        )
        return HTMLResponse(page.replace(place, place + WITHOUT_SCRIPT))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "Not ready."}})
    async def health() -> Response:
        """Whether it takes images."""
        return JSONResponse({"status": "ready" if server.ready else "not ready"}, 200 if server.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(server.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _read_body(request: Request, server: Server) -> tuple:
    """Inputs and parameters of a request: an image as it is, an upload, or JSON.

    Raises:
        ValueError: in one sentence, what is wrong with it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        async with server.parsing:  # thirty times its bytes, if it likes: one at a time, each looked at before the next
            return read_request(await asyncio.to_thread(_parse, body, "The request"))
    if kind in ("", "application/octet-stream") or kind.startswith("image/"):  # as the Hub's own client sends one
        return read_request({"inputs": await request.body()})
    if kind != "multipart/form-data":
        raise HTTPException(
            415, "Send an image (image/*), multipart/form-data with a file `image`, or application/json with `inputs`."
        )
    options = server.options
    limits = {"max_files": options.max_queue + 1, "max_fields": 10, "max_part_size": options.max_bytes}
    async with request.form(**limits) as form:
        fields: dict[str, list] = {}
        for name, value in form.multi_items():
            is_file = name in ("image", "images")
            if name not in ("image", "images", "parameters") or isinstance(value, str) == is_file:
                raise ValueError(f"An upload has files `image` or `images`, and `parameters`, but this one has {name}.")
            fields.setdefault(name, []).append(await value.read() if is_file else value)
    one, many, texts = (fields.get(name, []) for name in ("image", "images", "parameters"))
    if len(one) + bool(many) != 1 or len(texts) > 1:
        raise ValueError("An upload has one file `image`, or any number of files `images`, and `parameters` once.")
    parameters = _parse(texts[0], "parameters") if texts else {}
    return read_request({"inputs": many or one[0], "parameters": parameters})


def _parse(text: str | bytes, what: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is no JSON.") from None


def server_config(app: FastAPI, options) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=timed_protocol(options.timeout),
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=min(5, options.timeout),
        limit_concurrency=4 * options.max_queue,  # connections that ask for nothing cost a file each
    )


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        OSError: the port is taken, or the host is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise OSError(f"{host}:{port} cannot be used ({reason}); choose another --host or --port.") from error
    # asyncio sets it for sockets that it opens itself. Without it the second half of an answer waits 40 ms for the
    # client's acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(options) -> None:
    """Serves `options.checkpoint` until SIGTERM or SIGINT, and then ends what was taken.

    Args:
        options: `training.serve.ServeOptions`.

    Raises:
        ValueError, OSError: the checkpoint cannot be read, or the port is taken.
    """
    threads = torch.get_num_threads()
    compute_with(1)
    model, processor = load_checkpoint(options)
    tagger = MultiLabelImageClassificationPipeline(model=model, image_processor=processor)
    listener = listen(options.host, options.port)
    app = build_app(tagger, options, threads)

    def warm_up() -> None:  # the first call is the slowest, and fails where others would
        with computing(model):
            tagger(Image.new("RGB", (32, 32)))

    app.state.server.model_thread.submit(warm_up).result()
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again at its end, for whoever had asked for it
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{options.checkpoint} at {address}/predict; {address}/docs says how. Ctrl-C ends it.", flush=True)
    uvicorn.Server(server_config(app, options)).run(sockets=[listener])
