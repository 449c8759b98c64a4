"""What is stored, as the managers and the storage show it, compared with the model after each rule."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from vibe_store.checkpoint import CheckpointManager, list_checkpoints, load_manifest, load_metadata
from vibe_store.checkpoint.layout import write_best
from vibe_store.checkpoint.step_index import mark_key
from vibe_store.errors import CorruptCheckpointError, SaveFailedError, VibeStoreError
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.run_dir import RunDir
from vibe_store.testing.faulty_storage import FaultyStorage
from vibe_store.testing.state_machine.doing import CONFIGS, Between, Crash, Trouble, Writer, content
from vibe_store.testing.state_machine.model import BAD, Config, Loss, Model


class Stored(RuleBasedStateMachine):
    """A directory of checkpoints, two managers that write to it, and a model of it.

    It is compared with the model after each rule; the rules are those of the classes below this one.
    """

    make: ClassVar[Callable[[], StorageBackend]]
    rules_run: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = type(self).make()
        self.reader = CheckpointManager(self.inner)
        self.model = Model()
        self.configs = [Config(), Config()]
        self.writers: list[Writer | None] = [None, None]
        self.known: dict[tuple[Blob, ...], int] = {}
        self.listed: object = None
        self.just_swept = False
        self.on_disk = self.inner.local_path("") is not None

    @initialize(one=CONFIGS, other=CONFIGS)
    def open(self, one: Config, other: Config) -> None:
        self.configs = [one, other]

    @invariant()
    def what_is_stored_is_what_the_model_says(self) -> None:
        type(self).rules_run += 1
        model = self.model
        assert self._observe() == self._before()
        for writer in filter(None, self.writers):
            best = model.best_of(writer.config.mode)
            assert writer.manager.best_step() == (best[0] if best else None)
        stored = (model.best, tuple(self.inner.list()))
        if stored != self.listed:
            self._check_listings()
        self.listed = stored
        if self.just_swept and "manifest" not in model.damaged.values():
            assert self._garbage() == set()
        self.just_swept = False

    def _check_listings(self) -> None:
        model, steps = self.model, sorted(self.model.held)
        for manager in (self.reader, *(writer.manager for writer in self.writers if writer)):
            assert manager.all_steps() == steps
        statuses = list_checkpoints(self.inner)
        seen = {status.step for status in statuses}
        if self.on_disk:
            seen |= {step for step, _ in self._run_dir().list_checkpoints()}
        assert set(steps) <= seen <= set(steps) | model.scarred
        for status in statuses:
            if status.step in model.held:
                damaged = model.damaged.get(status.step) == "manifest"
                assert status.status == ("damaged" if damaged else "committed")
                assert status.best == (status.step == model.best)
                assert damaged or (status.info and status.info.pinned == (status.step in model.pins))

    def teardown(self) -> None:
        for who in (0, 1):
            self._close(who)
        root = self.inner.local_path("")
        if root is None:
            self.inner.delete([blob.key for blob in self.inner.list()])
        else:
            shutil.rmtree(root.parent, ignore_errors=True)

    # --- Helpers.

    def _writer(self, who: int) -> Writer:
        writer = self.writers[who]
        if writer is None:
            writer = self.writers[who] = Writer(self.inner, self.configs[who])
        return writer

    def _close(self, who: int) -> None:
        writer, self.writers[who] = self.writers[who], None
        if writer is not None:
            writer.manager.close()

    def _wait(self) -> None:
        for writer in filter(None, self.writers):
            writer.manager.wait()

    def _new(self, loss: Loss) -> int:
        seed = len(self.model.losses)
        self.model.losses[seed] = loss
        return seed

    def _try(
        self, storage: FaultyStorage, trouble: Trouble | Between | None, act: Callable[[], object]
    ) -> BaseException | None:
        """Do something that may fail, in a process that a crash leaves dead."""
        raised: BaseException | None = None
        storage.faults = trouble.faults() if trouble else ()
        try:
            act()
        except (VibeStoreError, OSError, Crash) as error:
            raised = error
        finally:
            if not (isinstance(trouble, Trouble) and trouble.kind == "crash"):
                storage.faults = ()
        if isinstance(raised, SaveFailedError):
            assert isinstance(raised.__cause__, Crash) or "injected fault" in str(raised)
        return raised

    def _after_trouble(self, who: int, trouble: Trouble) -> None:
        writer = self.writers[who]
        assert writer is not None
        if trouble.kind == "crash" and trouble.struck:
            self.writers[who] = None
            with suppress(SaveFailedError):
                writer.manager.close()  # unlocks, as the end of a process does; its storage is dead
        else:
            writer.storage.faults = ()

    def _replaced(self, step: int, seed: int) -> None:
        self.model.held[step] = seed
        self.model.damaged.pop(step, None)

    def _before(self) -> dict[int, int]:
        return {step: BAD if step in self.model.damaged else seed for step, seed in self.model.held.items()}

    def _observe(self) -> dict[int, int]:
        """Return which save each committed step holds; what did not change is not loaded again."""
        self._wait()
        folders: dict[str, list[Blob]] = {}
        for blob in self.inner.list("step_"):
            folders.setdefault(blob.key.partition("/")[0], []).append(blob)
        now = {}
        for folder, blobs in folders.items():
            if any(blob.key == f"{folder}/manifest.json" for blob in blobs):
                step, objects = int(folder.removeprefix("step_")), tuple(blobs)
                if objects not in self.known:
                    self.known[objects] = self._load(step)
                now[step] = self.known[objects]
        return now

    def _load(self, step: int) -> int:
        like = content(0, None)
        try:
            with_items = "aux" in load_manifest(self.inner, step=step).items
            state, items = self.reader.restore(
                step, like["pytree"], items=like["items"] if with_items else {}
            )
        except CorruptCheckpointError:
            return BAD
        seed = int(state["k"])
        saved = content(seed, self.model.losses[seed])
        assert state["w"].tobytes() == saved["pytree"]["w"].tobytes()
        assert with_items == (saved["items"] is not None)
        assert not with_items or items["aux"].tobytes() == saved["items"]["aux"].tobytes()
        assert load_metadata(self.inner, step=step) == saved["metadata"]
        assert repr(self.reader.info(step).metrics) == repr(saved["metrics"])
        return seed

    def _mark(self, storage: StorageBackend, step: int) -> None:
        if self.on_disk:
            self._run_dir().mark_best(step)
        else:
            write_best(storage, step)

    def _run_dir(self) -> RunDir:
        root = self.inner.local_path("")
        assert root is not None
        return RunDir(base_dir=root.parents[1], run_id=root.parent.name)

    def _is_pinned(self, step: int) -> bool:
        return any(blob.key == f"step_{step}/pinned" for blob in self.inner.list(f"step_{step}/"))

    def _garbage(self) -> set[str]:
        """Every key that no manifest names, apart from the known ones and from folders that are scarred."""
        root = self.inner.local_path("")
        keys = {blob.key for blob in self.inner.list()}
        if root is not None:
            keys = {
                str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()
            }
        keys -= {"best", ".vibe_store/writer.lock", ".vibe_store/writer.json"}
        for step in self.model.held:
            assert self.on_disk or mark_key(step) in keys
            keys.discard(mark_key(step))
            files = load_manifest(self.inner, step=step).files
            keys -= {f"step_{step}/{name}" for name in ("manifest.json", *(file.key for file in files))}
        keys -= {f"step_{step}/pinned" for step in self.model.pins}
        return {
            key
            for key in keys
            if key.partition("/")[0] not in {f"step_{step}" for step in self.model.scarred}
        }
