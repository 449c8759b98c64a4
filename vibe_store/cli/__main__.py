"""``python -m vibe_store.cli``: the same as ``vibe-store``."""

import sys

from vibe_store.cli import main

sys.exit(main())
