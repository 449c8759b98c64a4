"""What the authors of plugins need to test them: a storage that fails on demand."""

from vibe_store.testing.faulty_storage import EXIT_STATUS as EXIT_STATUS
from vibe_store.testing.faulty_storage import Call as Call
from vibe_store.testing.faulty_storage import Fault as Fault
from vibe_store.testing.faulty_storage import FaultyStorage as FaultyStorage
