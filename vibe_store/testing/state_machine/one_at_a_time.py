"""Rules that each do one thing, and compare what is stored with what that may have led to."""

import fcntl
import json
import warnings
from contextlib import suppress
from typing import Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from vibe_store.checkpoint import initialize_checkpoint_dir, load_manifest, save_checkpoint
from vibe_store.checkpoint.layout import read_best
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    SaveFailedError,
    StepAlreadyExistsError,
    WriterLockedError,
)
from vibe_store.testing.faulty_storage import FaultyStorage
from vibe_store.testing.state_machine.doing import (
    CONFIGS,
    LOSSES,
    STEPS,
    TROUBLES,
    WHO,
    Trouble,
    Writer,
    content,
    options,
    save_with,
)
from vibe_store.testing.state_machine.model import BAD, Config, Loss
from vibe_store.testing.state_machine.stored import Stored


class OneAtATime(Stored):
    """One thing is done at a time, and any of its calls may fail or be the last of its process."""

    @rule(
        who=WHO,
        step=STEPS,
        loss=LOSSES,
        force=st.booleans(),
        trouble=TROUBLES,
        told=st.sampled_from(["wait", "close", "save"]),
    )
    def save(self, who: int, step: int, loss: Loss, force: bool, trouble: Trouble, told: str) -> None:
        writer, seed, exists = self._writer(who), self._new(loss), step in self.model.held
        skipped = step % writer.config.interval != 0 and not force
        changes = len(writer.storage.calls)

        def act() -> None:
            save_with(writer.manager, step, seed, loss, force=force, expect=not skipped)
            if trouble.kind == "none" and not exists:
                return  # it goes on in the background, and whoever looks waits for it
            if told == "save" and not exists and not skipped:
                with suppress(OSError):
                    try:
                        writer.manager.save(step, 0, force=True)
                        writer.manager.wait()
                    except SaveFailedError as error:
                        if "was not begun" not in str(error):
                            raise  # it is the first one's failure
            elif told == "close":
                writer.manager.close()
            writer.manager.wait()

        error = self._try(writer.storage, trouble, act)
        self._after_trouble(who, trouble)
        if told == "close":
            self._close(who)
        now = self._observe()
        if skipped or (exists and isinstance(error, StepAlreadyExistsError)):
            assert skipped == (error is None)
            assert now == self._before()
            assert not skipped or len(writer.storage.calls) == changes
        elif exists:
            assert trouble.struck
            assert now == self._before()
        else:
            self._check_saved(writer, step, seed, now, error, trouble)
        writer.begun = True

    def _check_saved(
        self,
        writer: Writer,
        step: int,
        seed: int,
        now: dict[int, int],
        error: BaseException | None,
        trouble: Trouble,
    ) -> None:
        before = self._before()
        self.model.held[step] = seed
        doomed = self.model.given_up(writer.config, step, writer.restored)
        if not trouble.struck:
            assert error is None
            assert now == {s: held for s, held in (before | {step: seed}).items() if s not in doomed}
            self.just_swept |= not writer.begun
        else:
            committed, said = step in now, error is None or f"Step {step} was saved" in str(error)
            assert committed or not said
            assert trouble.kind == "crash" or trouble.how == "after" or committed == said
            if committed:
                assert now.items() <= (before | {step: seed}).items()
                assert before.keys() - now.keys() <= doomed
            else:
                assert now == before
        self.model.forget(self.model.held.keys() - now.keys())

    @rule(who=WHO, saves=st.lists(st.tuples(STEPS, LOSSES), min_size=1, max_size=4))
    def train(self, who: int, saves: list[tuple[int, Loss]]) -> None:
        """Save some steps in a row, with nothing between that would look at the directory."""
        for step, loss in saves:
            self.save(who, step, loss, True, Trouble("none", 0, "before"), "wait")

    @rule(step=STEPS, loss=LOSSES, trouble=TROUBLES)
    def overwrite(self, step: int, loss: Loss, trouble: Trouble) -> None:
        seed, storage = self._new(loss), FaultyStorage(self.inner)
        error = self._try(
            storage, trouble, lambda: save_checkpoint(storage, step=step, **content(seed, loss))
        )
        now, before = self._observe(), self._before()
        swept = self.on_disk and "manifest" not in self.model.damaged.values()
        self.just_swept |= swept and not trouble.struck
        if error is None or now.get(step) == seed:
            assert now == before | {step: seed}
            self._replaced(step, seed)
        else:
            assert now == before
        assert error is None or trouble.struck
        if trouble.kind == "fail" and trouble.how != "after":
            assert (error is None) == (now.get(step) == seed)

    @rule(who=WHO, step=st.none() | STEPS, trouble=TROUBLES)
    def restore(self, who: int, step: int | None, trouble: Trouble) -> None:
        writer, before, found = self._writer(who), self._before(), []
        good = [s for s, held in before.items() if held != BAD]
        wanted = max(good, default=None) if step is None else step
        newer = [s for s in before if step is None and s not in good and s > (wanted or 0)]

        def act() -> None:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                loaded = writer.manager.restore(step, content(0, None)["pytree"])
            found.append(loaded["k"])
            assert [w.category for w in told] == [DamagedCheckpointWarning] * len(newer)

        error = self._try(writer.storage, trouble, act)
        self._after_trouble(who, trouble)
        if found:
            assert wanted is not None
            assert found == [before[wanted]]
            writer.restored = wanted
        elif not trouble.struck:
            damaged = bool(before) if step is None else step in before
            assert isinstance(error, CorruptCheckpointError if damaged else CheckpointNotFoundError)
            assert wanted not in good

    @rule(who=WHO, step=STEPS, pinned=st.booleans(), trouble=TROUBLES)
    def pin_or_unpin(self, who: int, step: int, pinned: bool, trouble: Trouble) -> None:
        writer = self._writer(who)
        act = writer.manager.pin if pinned else writer.manager.unpin
        error = self._try(writer.storage, trouble, lambda: act(step))
        self._after_trouble(who, trouble)
        done = error is None or (trouble.struck and pinned == self._is_pinned(step))
        if done:
            (self.model.pins.add if pinned else self.model.pins.discard)(step)
        elif not trouble.struck:
            bad = self.model.damaged.get(step) == "manifest"
            assert bad or step not in self.model.held
            assert isinstance(error, CorruptCheckpointError if bad else CheckpointNotFoundError)
        if self.on_disk and error is None and not trouble.struck:
            self.just_swept |= not writer.begun
        writer.begun = True

    @rule(step=STEPS, trouble=TROUBLES)
    def mark_best(self, step: int, trouble: Trouble) -> None:
        storage = FaultyStorage(self.inner)
        error = self._try(storage, trouble, lambda: self._mark(storage, step))
        assert error is None or trouble.struck
        if error is None or read_best(self.inner) == step:
            self.model.best = step

    @precondition(lambda self: self.model.held and not self.model.damaged)
    @rule(
        index=st.integers(0, 9),
        what=st.sampled_from(["file", "manifest"]),
        how=st.sampled_from(["flip", "cut", "gone"]),
    )
    def damage(self, index: int, what: Literal["file", "manifest"], how: str) -> None:
        self._wait()
        step = sorted(self.model.held)[index % len(self.model.held)]
        name = "manifest.json"
        if what == "file":
            name = load_manifest(self.inner, step=step).items["state"].files["state.eqx"].key
        key = f"step_{step}/{name}"
        data = bytearray(self.inner.read(key))
        data[len(data) // 2] ^= 4
        if how == "gone" and what == "file":
            self.inner.delete([key])
        else:
            self.inner.write(key, bytes(data) if how == "flip" else bytes(data[:-1]))
        self.model.damaged[step] = what
        if what == "manifest":
            self.model.scarred.add(step)

    @rule(who=WHO, config=CONFIGS)
    def reopen(self, who: int, config: Config) -> None:
        self._close(who)
        self.configs[who] = config
        self._writer(who)

    @rule(who=WHO, config=CONFIGS)
    def resume(self, who: int, config: Config) -> None:
        self._wait()
        self._close(who)
        self.configs[who] = config
        before = self._before()
        good = max((s for s, held in before.items() if held != BAD), default=-1)
        aside = {s for s in before if s > good}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            manager, resuming = initialize_checkpoint_dir(self.inner, resume=True, **options(config))
        manager.close()
        assert [w.category for w in told] == [DamagedCheckpointWarning] * len(aside)
        assert resuming == (good >= 0)
        for step in aside:
            del self.model.held[step], self.model.damaged[step]
        self.model.scarred |= aside

    @precondition(lambda self: self.on_disk)
    @rule(step=STEPS)
    def save_while_another_process_writes(self, step: int) -> None:
        self._close(0)
        self._close(1)
        path = self.inner.local_path(".vibe_store/writer.lock")
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            json.dump({"pid": 1, "purpose": "manager"}, lock)
            lock.flush()
            with pytest.raises(WriterLockedError):
                self._writer(0).manager.save(step, 0, force=True)
