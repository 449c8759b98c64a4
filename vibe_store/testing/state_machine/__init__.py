"""A directory to which two writers do all that can be done, while a model says what it should hold."""

from vibe_store.testing.state_machine.checking import Directory as Directory
from vibe_store.testing.state_machine.checking import check_directory as check_directory
