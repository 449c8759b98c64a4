"""Settings for every test."""

import os
import signal

# Before JAX is imported: the tests run anywhere, and two workers must not fight over all cores.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A shell starts what runs in its background with Ctrl-C ignored, and every process from there inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
