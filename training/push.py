"""Publish a finished run on the Hub: one commit with a tag, checked before it leaves and again when it has arrived.

    hsvlt push RUN_FOLDER org/name [--tag v1] [--public] [--license apache-2.0] [--dry_run]
    hsvlt push RUN_FOLDER org/prompts --adapter_of org/base   # of an HP-DVAL: its learned contexts alone

What is pushed: weights, configuration with thresholds, processor, the code they need, results.json, per_label.csv where
the run was evaluated, selected_tags.csv, the run's options, and a card filled from all that. Before, the folder is
loaded in a process that cannot import this package, and its logits are compared. RUN_FOLDER may also be the folder of a
checkpoint, or of a PEFT adapter. The repository is private unless you say --public; an existing one stays as it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .options import command, option
from .say import option_words, say_next


@dataclass(kw_only=True)
class PushOptions:
    run: Path = option(reason="or a checkpoint's or adapter's folder", positional=True, metavar="RUN_FOLDER")
    repo_id: str = option(reason="where to", positional=True, metavar="org/name")
    tag: str | None = option(None, "name of this version; null: the next free of v1, v2, ...")
    public: bool = option(False, "make a new repository public; it is private otherwise")
    license: str | None = option(None, "of the weights, as the Hub names it; null: unknown, or apache-2.0 for scenes")
    adapter_of: str | None = option(None, "push the learned contexts alone, as its adapter", metavar="org/base")
    adapter_revision: str | None = option(None, "commit or tag of org/base to check the adapter on")
    images: bool = option(False, "images of the dataset may be shown on the card")
    dry_run: bool = option(False, "build, check and list; leave the card as a page, card.html in the run; send nothing")
    folder: Path | None = option(None, "leave what was built here; null: nowhere")


def run(options: PushOptions) -> None:
    """Builds, checks and pushes."""
    from .publish.hub import push_run

    args = dict(vars(options))
    licence, private = args.pop("license"), not args.pop("public")
    folder, repo_id = args.pop("run"), args.pop("repo_id")
    push_run(folder, repo_id, private=private, licence=licence, **args)
    if options.dry_run:
        kept = ("tag", "public", "license", "adapter_of", "adapter_revision", "images")
        say_next("push", folder, repo_id, *option_words(options, kept))
    elif options.adapter_of is None:
        say_next("tag", repo_id, "photo.jpg")


main = command(run, PushOptions, "push", __doc__, stopped="Stopped; the repository is as it was.")


if __name__ == "__main__":
    sys.exit(main())
