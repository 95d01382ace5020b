"""Decodes images in a process that may crash, hang or want too much memory, and tells which of it happened."""

import multiprocessing
import resource
import time
import warnings
from pathlib import Path

SECONDS = 10.0  # for one image, on a machine that does other work as well
# 89 million pixels at 4 bytes, once as decoded and once more as converted, and what Python and its libraries take.
MEMORY = 3 * 2**30


def decode(path: str) -> tuple[str, str]:
    """("decoded", size and what the decoder warned of) or ("named", message) or ("unnamed", message), the same from a
    file and from bytes."""
    from modeling_hsvlt.load_image import load_image

    outcomes = set()
    for source in (path, {"bytes": Path(path).read_bytes(), "path": path}):
        if isinstance(source, dict) and not source["bytes"]:
            continue  # datasets.Image takes no bytes for a path
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                image = load_image(source)
        except ValueError as error:
            outcomes.add(("named" if Path(path).name in str(error) else "unnamed", str(error)))
        except Exception as error:
            outcomes.add(("unnamed", repr(error)))
        else:
            said = {f"{image.width} x {image.height}": None, **{str(warning.message): None for warning in caught}}
            outcomes.add(("decoded", "; ".join(said)) if image.mode == "RGB" else ("unnamed", f"mode {image.mode}"))
    return max(outcomes)  # "unnamed" before "named" before "decoded"


def work(connection) -> None:
    import modeling_hsvlt.load_image  # noqa: F401  (before the clock runs, and before the limit)

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    connection.send(None)
    while path := connection.recv():
        start = time.monotonic()
        outcome = decode(path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        connection.send((*outcome, time.monotonic() - start, peak))


def fuzz(folder: Path) -> tuple[dict[str, tuple[str, str]], float, float]:
    """Outcome of every file in `folder`, the longest seconds and the highest MiB of a process."""
    outcomes, longest, peak = {}, 0.0, 0.0
    context = multiprocessing.get_context("spawn")

    def start():
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there,), daemon=True)
        process.start()
        there.close()
        here.recv()
        return process, here

    process, connection = start()
    for path in sorted(folder.iterdir()):
        connection.send(str(path))
        try:
            if connection.poll(SECONDS):
                kind, message, seconds, mebibytes = connection.recv()
                outcomes[path.name] = (kind, message)
                longest, peak = max(longest, seconds), max(peak, mebibytes)
                continue
            outcomes[path.name] = ("hung", f"more than {SECONDS:g} s")
        except EOFError:
            process.join()
            outcomes[path.name] = ("crashed", f"exit status {process.exitcode}")
        process.kill()
        process, connection = start()
    connection.send(None)
    process.join()
    return outcomes, longest, peak
