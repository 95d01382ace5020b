"""`push_folder` to a Hub of `tests.loopback_hub`, as a command of its own that can be interrupted and killed."""

import signal
from pathlib import Path

from huggingface_hub import HfApi, constants

from tests.loopback_hub import TOKEN
from training.publish.hub import PushError, push_folder


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where this runs in the background
    endpoint, folder, repo_id, tag = argv
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, False
    try:
        push_folder(Path(folder), repo_id, private=True, tag=tag, api=HfApi(endpoint=endpoint, token=TOKEN))
    except (PushError, KeyboardInterrupt) as error:
        print(repr(error))
        return 130
    return 0
