"""A push: one commit with a tag, checked before it leaves and again when it has arrived."""

from __future__ import annotations

import fnmatch
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..checkpoint.atomic import write_file
from ..checkpoint.loading import seal_of
from ..places import run_of
from .build import build_folder, check_no_path
from .card import render_card
from .card_page import card_page
from .measured import checkpoint_of
from .reload import check_folder, scratch_folder

RETRY_SECONDS = (1, 2, 4, 8)  # waits between attempts at a request
# Files of an earlier push that would be taken for part of the new one.
SHADOWS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_config.json", "config.json", "*.py")


class PushError(OSError):
    """A push that did not arrive; the message says what the remote holds now."""


def push_run(
    run: Path,
    repo_id: str,
    *,
    private: bool = True,
    tag: str | None = None,
    licence: str | None = None,
    adapter_of: str | None = None,
    adapter_revision: str | None = None,
    images: bool = False,
    dry_run: bool = False,
    folder: Path | None = None,
) -> str | None:
    """Builds, checks and pushes a run.

    Args:
        run: Of `training.train`, or the folder of a checkpoint or of an adapter, which names its base itself.
        licence: None: Apache-2.0 where everything is this project's own (built-in scenes, random weights), else
            "unknown".
        The others are those of `training.push.PushOptions`.

    Returns:
        The commit's id, or None for a dry run.

    Raises:
        ValueError: a run that cannot be published as it is, or that changes meanwhile, a tag that exists, an adapter
            that does not fit its base.
        PushError: the Hub did not take it; it is then as it was before.
    """
    with ExitStack() as held:
        scratch = held.enter_context(scratch_folder())
        target = Path(scratch) / "folder" if folder is None else Path(folder)
        if target.exists() and any(target.iterdir()):
            raise FileExistsError(f"{target} is not empty; choose another folder to build in.")
        target.mkdir(parents=True, exist_ok=True)
        api = HfApi()
        if not dry_run:
            tag = _free_tag(api, repo_id, tag)
        before = seal_of(checkpoint_of(run))
        expected = build_folder(run, target, adapter_of=adapter_of, adapter_revision=adapter_revision)
        difference = check_folder(target, *expected)
        card = render_card(
            run, target, repo_id=repo_id, tag=tag, licence=licence, adapter_revision=adapter_revision, images=images
        )
        card.save(target / "README.md")
        if seal_of(checkpoint_of(run)) != before:
            raise ValueError(f"{run} was changed while it was read: wait for the end of the run that writes it.")
        check_no_path(Path(run), target)
        print(f"Reloaded without this package: logits differ by at most {difference:.1e}.")
        for path, size in _tree(target):
            print(f"{size:>13,}  {path}")
        if dry_run:
            page = run_of(run) / "card.html"
            write_file(page, card_page(target, repo_id))
            print(f"The card as a page: {page}\nDry run: nothing was sent to {repo_id}.")
            return None
        revision = push_folder(target, repo_id, private=private, tag=tag, api=api)
        with _signals(signal.SIG_IGN, signal.SIGINT):  # it has arrived, and nothing may say otherwise
            held.close()
            print(f"Pushed: {api.endpoint}/{repo_id} at revision {revision}, tag {tag}.")
    return revision


def _tree(folder: Path) -> list[tuple[str, int]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def push_folder(folder: Path, repo_id: str, *, private: bool, tag: str, api: HfApi | None = None) -> str:
    """Sends a folder in one commit and tags it; whatever fails, the repository is afterwards as it was before.

    Files of an earlier push that would be taken for part of this one (weights, code) are deleted in the same commit;
    others, such as an ONNX export, stay.

    Returns:
        The commit's id.

    Raises:
        PushError: the Hub did not take it.
        KeyboardInterrupt: SIGINT or SIGTERM; what had arrived is taken back first.
    """
    # SIGTERM by itself would end the process, unless somebody else takes care of it.
    mine = [signal.SIGTERM] if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else []
    with _signals(signal.default_int_handler, *mine):
        return _push(api or HfApi(), folder, repo_id, private, tag)


def _push(api: HfApi, folder: Path, repo_id: str, private: bool, tag: str) -> str:
    existed = _retry(lambda: api.repo_exists(repo_id))
    tags = {ref.name for ref in _retry(lambda: api.list_repo_refs(repo_id)).tags} if existed else set()
    parent = None
    try:
        if not existed:
            _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        parent = _retry(lambda: api.repo_info(repo_id).sha)
        old = {item.path for item in _files(api, repo_id, parent)}
        new = {path for path, _ in _tree(folder)}
        shadows = sorted(p for p in old - new if "/" not in p and any(fnmatch.fnmatch(p, s) for s in SHADOWS))
        revision = _retry(lambda: _commit(api, repo_id, folder, sorted(new), shadows, parent))
        _retry(lambda: _tag(api, repo_id, tag, revision))
        return revision
    except BaseException as error:
        message = f"{repo_id} was not pushed: {_one_line(error)}"
        with _signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            try:
                _retry(lambda: _undo(api, repo_id, existed, parent, folder, None if tag in tags else tag))
            except Exception as second:
                raise PushError(
                    f"{message} Taking it back failed as well ({_one_line(second)}); look at {repo_id}."
                ) from error
        if not isinstance(error, Exception):
            raise
        raise PushError(f"{message} The repository is as it was; try again.") from error


@contextmanager
def _signals(handler: Any, *numbers: int) -> Iterator[None]:
    """Within the block these signals have this handler; Python gives them to the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _commit(api: HfApi, repo_id: str, folder: Path, paths: list[str], shadows: list[str], parent: str) -> str:
    head = api.repo_info(repo_id).sha
    if head != parent:  # an earlier attempt whose answer was lost, or somebody else's commit
        if _arrived(api, repo_id, head, folder):
            return head
        raise PushError("somebody else has committed meanwhile.")
    operations = [CommitOperationAdd(path, str(folder / path)) for path in paths]
    operations += [CommitOperationDelete(path) for path in shadows]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload model, processor, code, results and card", parent_commit=parent
    )
    if not _arrived(api, repo_id, commit.oid, folder):
        raise PushError("the files that arrived are not those that were sent.")
    return commit.oid


def _files(api: HfApi, repo_id: str, revision: str) -> list:
    return [item for item in api.list_repo_tree(repo_id, recursive=True, revision=revision) if hasattr(item, "blob_id")]


def _arrived(api: HfApi, repo_id: str, revision: str, folder: Path) -> bool:
    """Whether the repository holds every file of the folder, by hash."""
    found = api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder)
    return not found.mismatches and not found.extra_paths  # extra are those that are here alone


def _tag(api: HfApi, repo_id: str, tag: str, revision: str) -> None:
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tags.get(tag) != revision:  # else an earlier attempt whose answer was lost
        api.create_tag(repo_id, tag=tag, revision=revision)


def _free_tag(api: HfApi, repo_id: str, tag: str | None) -> str:
    """`tag`, or the next free of v1, v2, ...

    Raises:
        ValueError: the tag is taken.
    """
    if not _retry(lambda: api.repo_exists(repo_id)):
        return tag or "v1"
    taken = {ref.name for ref in _retry(lambda: api.list_repo_refs(repo_id)).tags}
    if tag in taken:
        raise ValueError(f"{repo_id} has a tag {tag!r} already; choose another one with --tag.")
    return tag or next(name for number in range(1, len(taken) + 2) if (name := f"v{number}") not in taken)


def _undo(api: HfApi, repo_id: str, existed: bool, parent: str | None, folder: Path, tag: str | None) -> None:
    """Deletes a repository that this push made; else puts the files back, if they had been replaced, and deletes the
    tag that it may have made."""
    if not existed:
        if api.repo_exists(repo_id):
            ours = {path for path, _ in _tree(folder)} | {".gitattributes"}
            if {item.path for item in _files(api, repo_id, "main")} <= ours:
                api.delete_repo(repo_id)
        return
    if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
        api.delete_tag(repo_id, tag=tag)
    head = None if parent is None else api.repo_info(repo_id).sha
    if head == parent:
        return
    before = {item.path: item.blob_id for item in _files(api, repo_id, parent)}
    now = {item.path: item.blob_id for item in _files(api, repo_id, head)}
    operations = [CommitOperationDelete(path) for path in sorted(now.keys() - before.keys())]
    for path, blob in sorted(before.items()):
        if now.get(path) != blob:
            operations.append(CommitOperationCopy(path, path, src_revision=parent))
    api.create_commit(repo_id, operations, commit_message="Take back an unfinished push", parent_commit=head)


def _retry(call: Callable):
    for wait in (*RETRY_SECONDS, None):
        try:
            return call()
        except EntryNotFoundError:
            raise
        except Exception as error:
            if wait is None or not _may_pass(error):
                raise
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether it is worth asking again: the server is busy or the connection broke."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    # The HTTP library behind huggingface_hub depends on its version, and has exceptions of its own.
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in ("httpx", "httpx2", "httpcore", "requests")


def _one_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if text.endswith(".") else f"{text}."
