"""`push_folder` to a Hub of `tests.loopback_hub`, as a command of its own that can be interrupted and killed; with a
fifth argument the whole of `training.push`, which builds in that folder."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants

import training.publish.hub
from tests.loopback_hub import TOKEN
from training import push
from training.publish.hub import PushError, push_folder


def main(argv: list[str]) -> int:
    endpoint, folder, repo_id, tag, *scratch = argv
    constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = True, False
    api = HfApi(endpoint=endpoint, token=TOKEN)
    if scratch:
        (tempfile.tempdir,) = scratch
        training.publish.hub.HfApi = lambda: api
        return push.main([folder, repo_id, *(["--tag", tag] if tag else [])])
    try:
        push_folder(Path(folder), repo_id, private=True, tag=tag, api=api)
    except (PushError, KeyboardInterrupt) as error:
        print(repr(error))
        return 130
    return 0
