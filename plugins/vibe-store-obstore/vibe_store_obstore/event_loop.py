"""The event loop on which requests run, in a thread of its own, one for each process."""

import asyncio
import atexit
import os
import threading
import time

__all__ = ["event_loop"]

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid = 0

_LETTING_GO_SECS = 0.1


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop of this process; the first call starts it.

    Raises:
        RuntimeError: the process was forked after the first request. The threads of the Rust object store are
            not in the child, so that a request would never end.
    """
    global _loop, _pid
    with _lock:
        if _loop is None:
            _loop, _pid = asyncio.new_event_loop(), os.getpid()
            thread = threading.Thread(target=_loop.run_forever, name="vibe_store obstore", daemon=True)
            thread.start()
            atexit.register(_stop, _loop, thread)
        if _pid != os.getpid():
            raise RuntimeError(
                f"This process was forked from process {_pid} after that one had used the Rust object store, "
                "which cannot go on in a child. Start processes with the method 'spawn' or 'forkserver'."
            )
        return _loop


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Let nothing be under way when the interpreter ends: a Rust thread that then wants it ends in an abort.

    That a thread of the Rust object store has answered is not to say that it has let go of what it asked
    with, and nothing tells when it has: it is given time for it.
    """
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    time.sleep(_LETTING_GO_SECS)


# Another thread may have held the lock when this process was forked, and it lives on in the parent only.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
