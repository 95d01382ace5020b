"""Open a demo of a checkpoint in the browser: drop an image, see its labels, choose one to see where it was found.

    hsvlt demo                    the newest run below runs/
    hsvlt demo runs/photos        or any run, checkpoint or Hub id

The checkpoint's own code is run; of a Hub id, pin the commit (`org/name@commit`).
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from importlib.util import find_spec

from .options import NewestOptions, command
from .places import last_run, shipped


def run(args: NewestOptions) -> None:
    """Runs the Space's app.

    Raises:
        ValueError, OSError: there is no run, or no gradio.
    """
    checkpoint, app = args.checkpoint or last_run(), shipped("space") / "app.py"
    if find_spec("gradio") is None:
        requirements, start = shlex.quote(str(app.with_name("requirements.txt"))), shlex.quote(str(app))
        raise ValueError(
            "hsvlt demo needs gradio, which wants an older Pillow than this package and so an environment of its own: "
            f"python -m venv demo && demo/bin/pip install -r {requirements} && "
            f"MODELS={shlex.quote(checkpoint)} demo/bin/python {start}"
        )
    print(f"{checkpoint}, until Ctrl-C.")
    os.environ |= {"MODELS": f"{checkpoint}\n", "OPEN_BROWSER": "1"}
    runpy.run_path(str(app), run_name="__main__")


main = command(run, NewestOptions, "demo", __doc__)


if __name__ == "__main__":
    sys.exit(main())
