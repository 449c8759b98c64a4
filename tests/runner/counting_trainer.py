"""A trainer in a process of its own that resumes, or fails to, for the tests of ``verify_resume``.

Its arguments are the folder to train into and what it does: "resumes", "forgets" (a number that decides what
follows is not saved), "begins anew", "fails", or "saves once".
"""

import sys
import time

import numpy as np

from vibe_store.checkpoint import initialize_checkpoint_dir

_STEPS = 20


def main(directory: str, does: str) -> None:
    if does == "fails":
        sys.stdout.write("there is no bread\n")
        sys.exit(3)
    anew = does == "begins anew"
    manager, resuming = initialize_checkpoint_dir(
        directory, resume=not anew, overwrite=anew, async_timeout_secs=None
    )
    state, start, forgotten = {"x": np.zeros(3), "n": np.zeros((), np.int32)}, 1, 1.0
    if resuming:
        start = manager.latest_step() + 1
        state = manager.restore(start - 1, state)
    with manager:
        for step in range(start, _STEPS + 1):
            time.sleep(0.03)
            forgotten += 1
            change = forgotten if does == "forgets" else step
            state = {"x": state["x"] * 0.9 + [0, 0, change], "n": state["n"] + np.int32(1)}
            if does != "saves once" or step == _STEPS:
                manager.save(step, state, items={"rest": {"step": step}})


if __name__ == "__main__":
    main(*sys.argv[1:])
