"""Several labels per image: train, tag, evaluate and publish.

hsvlt train FOLDER                   a tagger for your photographs, with the recipe `photos`
hsvlt tag photo.jpg                  its labels, by the last run
hsvlt COMMAND --help                 what a command takes
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from difflib import get_close_matches
from importlib import metadata

from .places import cores, native_precision

# name: its module, and what it does
COMMANDS = {
    "train": ("train", "train on a folder of images, or any dataset"),
    "tag": ("tag", "label images: a table in the terminal, or files for any number of them"),
    "evaluate": ("evaluate", "compute the metrics of a checkpoint and write an HTML report"),
    "check": ("check_data", "find corrupt images, duplicates and suspicious labels before training"),
    "prepare": ("prepare.__main__", "turn COCO, VOC, NUS-WIDE, CSV or other tables into a Hugging Face dataset"),
    "split": ("split", "divide a dataset so that every label keeps its share"),
    "thresholds": ("fit_thresholds", "fit a threshold per label: best F1, a precision, a recall or a cost"),
    "calibrate": ("calibrate", "make scores honest: of the images scored 0.8, about 80 % show the label"),
    "export": ("export", "write ONNX files, for tools without PyTorch"),
    "push": ("push", "publish a run on the Hub, checked before and after"),
    "convert": ("convert", "convert weights of the official HSVLT, ConvNeXt and CAT"),
    "serve": ("serve", "serve a checkpoint over HTTP, in batches"),
    "demo": ("demo", "open a demo of a checkpoint in the browser"),
}
ON_ALL_DEVICES = ("train", "tag", "evaluate")
# An extra beside `train`: the packages that only it brings
EXTRAS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "serve": ("fastapi", "h11", "prometheus_client", "python_multipart", "starlette", "uvicorn"),
}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")  # a launcher sets one of these


def main(argv: list[str] | None = None) -> int:
    """The command line: the exit status of the command; 2 for what cannot be read, and for an extra that is missing."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help"):
        print(__doc__, *(f"    {command:<12}{words}" for command, (_, words) in COMMANDS.items()), sep="\n")
        return 0 if name else 2
    if name == "--version":
        print(f"hsvlt {metadata.version('hsvlt')}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        return _refuse(f"there is no command {name!r}: {f'did you mean {near[0]}?' if near else 'see hsvlt --help.'}")
    module = f"{__package__}.{COMMANDS[name][0]}"
    try:
        command = importlib.import_module(module)
        here = {"-h", "--help"} & set(arguments) or (name == "tag" and command.few_images(arguments[1:]) is not None)
        if name in ON_ALL_DEVICES and not here:
            status = launch(module, arguments[1:], mixed_precision=name == "train")
            if status is not None:
                return status
        return command.main(arguments[1:])
    except FileNotFoundError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", __package__, "modeling_hsvlt"):
            raise
        extra = ",".join(["train", *(extra for extra, packages in EXTRAS.items() if missing in packages)])
        return _refuse(f'hsvlt {name} needs the package {missing!r}: in the checkout, pip install ".[{extra}]".')
    except KeyboardInterrupt:
        return 130


def _refuse(words: str) -> int:
    print(f"error: {words}", file=sys.stderr)
    return 2


def launch(module: str, arguments: list[str], *, mixed_precision: bool) -> int | None:
    """Runs `module` with accelerate: as the user's own `accelerate config` says, else on all GPUs of this machine.

    Returns:
        The exit status; None where this process is enough, which is then set up for it.
    """
    if any(name in os.environ for name in LAUNCHED):
        return None
    import torch
    from accelerate.commands.config.config_args import default_config_file

    count = torch.cuda.device_count()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    precision = native_precision() if mixed_precision and count else "no"
    if os.path.isfile(default_config_file):
        options = []
    elif count > 1:
        options = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(count), "--dynamo_backend", "no",
                   "--mixed_precision", precision]  # fmt: skip
    else:
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        return None
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // max(1, count))))  # accelerate's own default is 1
    return run_launcher(options, module, arguments)


def run_launcher(options: list[str], module: str, arguments: list[str]) -> int:
    """`accelerate launch OPTIONS -m MODULE ARGUMENTS` in this process, without its traceback where that ends badly."""
    import logging

    import psutil
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser

    def pass_on(number: int, frame) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun's own way kills what has not saved within 30 s
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else several processes on a CPU would not know of each other
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", module, *arguments]))
    except Exception as error:
        status = getattr(error, "returncode", None)  # of one process
        if status is None and hasattr(error, "failures"):  # of several: one that ended by itself, not by a signal
            status = max(failure.exitcode for failure in error.failures.values())
        if status is None:
            print(f"error: accelerate could not start: {error}", file=sys.stderr)
        return status if status and status > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
