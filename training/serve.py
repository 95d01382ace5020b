"""Serve a checkpoint over HTTP: images come in, labels go out, and what arrives together is computed together.

    hsvlt serve                   the newest run below runs/
    hsvlt serve runs/photos       or any run, checkpoint or Hub id
    curl -F image=@photo.jpg -F 'parameters={"threshold": "auto"}' http://127.0.0.1:8000/predict

`/predict` takes files (multipart: `image`, or `images` for a list), JSON (`{"inputs": BASE64, "parameters": {}}`, or
a list in `inputs`) or one image as it is, and answers as the pipeline does; `parameters` are threshold, top_k, labels
and explain. `/health` says whether it is ready, `/metrics` is for Prometheus, `/docs` is the page of the interface.
There is no password: put a proxy in front of it before strangers can reach it. SIGTERM and Ctrl-C end it when what it
took is answered.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .options import NewestOptions, command, option
from .places import last_run


@dataclass(kw_only=True)
class ServeOptions(NewestOptions):
    revision: str | None = option(None, "commit of a CHECKPOINT on the Hub")
    host: str = option("127.0.0.1", "0.0.0.0: for other machines too")
    port: int = option(8000, "0: any that is free")
    batch_size: int = option(16, "images that are computed together at most")
    wait_ms: float = option(5.0, "milliseconds that the first image of a batch waits for others")
    max_queue: int = option(128, "images that are taken at a time, of all requests; more are answered with 503")
    max_bytes: int = option(2**24, "of a request, and of an image at an address")
    max_pixels: int = option(50_000_000, "of an image")
    timeout: float = option(30.0, "seconds that a client may take to send a request, and to take a piece of the answer")
    allow_urls: bool = option(False, "read images at addresses too, if they are on the public internet")

    def __post_init__(self):
        for name in ("batch_size", "max_queue", "max_bytes", "max_pixels", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, but it is {getattr(self, name)}.")
        if not self.wait_ms >= 0:
            raise ValueError(f"wait_ms must be 0 or more, but it is {self.wait_ms}.")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be from 0 to 65535, but it is {self.port}.")


def run(args: ServeOptions) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Raises:
        ValueError, OSError: there is no run, or the port is taken.
        ModuleNotFoundError: the extra is not installed.
    """
    args.checkpoint = args.checkpoint or last_run()
    from .tagging.server import serve  # after the options: --help waits for no library

    serve(args)


main = command(run, ServeOptions, "serve", __doc__)


if __name__ == "__main__":
    sys.exit(main())
