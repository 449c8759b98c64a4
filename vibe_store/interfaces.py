"""The four interfaces that plugins implement, and the records that pass between them; standard library only.

A :class:`StorageBackend` knows keys, bytes and files. A :class:`Serializer` knows pytrees and one local
folder. A :class:`RetentionPolicy` is a function from records to steps. A :class:`Checkpointer` is all that a
training loop sees. None of them knows another.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, Self, TypeAlias, overload

__all__ = [
    "Blob",
    "CheckpointInfo",
    "Checkpointer",
    "FileEntry",
    "Leaf",
    "LeafKind",
    "PyTree",
    "RetentionPolicy",
    "SavedItem",
    "Serializer",
    "Source",
    "StorageBackend",
    "Verify",
]

PyTree: TypeAlias = Any
"""Any JAX pytree. (This module does not import JAX, so it cannot say more.)"""

LeafKind: TypeAlias = Literal[
    "array", "numpy", "numpy_scalar", "key", "bool", "int", "float", "complex", "str", "bytes", "callable"
]
"""What a leaf was when it was saved: a ``jax.Array``, a ``numpy.ndarray``, a ``numpy.generic``, a typed PRNG
key (array), a Python scalar, a string, bytes, or a callable (recorded by name only, never stored)."""


Verify: TypeAlias = Literal["full", "sizes", "off"]
"""How much of what is loaded is checked: ``"full"`` is every size and checksum; ``"sizes"`` only that each
file has its size; ``"off"`` nothing, to save what can be saved of a damaged checkpoint. Manifests are always
verified, and the tree is always compared with its template."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One object of a storage, as a listing shows it.

    Attributes:
        key: its key, relative to the root of the storage.
        size: its length in bytes.
        modified: when it was last written, in seconds since the epoch, by the storage's own clock.
        version: differs whenever other bytes were written (on S3 the ETag, on GCS the generation); None where
            a storage has no such thing.
    """

    key: str
    size: int
    modified: float
    version: str | None = None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file that a serializer wrote.

    Attributes:
        name: its path relative to the folder that the serializer was given, joined by ``"/"``.
        size: its length in bytes.
        checksum: xxh3-128 of its bytes, as 32 lower-case hexadecimal digits.
    """

    name: str
    size: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """One row of a leaf table: what one leaf of a saved pytree was.

    Attributes:
        path: where in the tree, as ``jax.tree_util.keystr`` writes it; the root of the tree is ``""``. Dict
            keys that are equal are written alike: ``np.int64(1)`` and ``True`` as ``1``.
        kind: what the leaf was.
        dtype: NumPy's (or ml_dtypes') name of the element type of the stored data, where data is stored.
            For a typed key this is the type of its key data.
        shape: the shape of the stored data, where data is stored; for a typed key, of its key data.
        impl: the PRNG implementation of a typed key.
        value: a string, base64 of bytes, or the name of a callable.
        offset: where the data begins in its file, for serializers whose files have such a place.
        checksum: xxh3-128 of the stored data, for serializers that can read one leaf alone.
    """

    path: str
    kind: LeafKind
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    impl: str | None = None
    value: str | None = None
    offset: int | None = None
    checksum: str | None = None


@dataclass(frozen=True, slots=True)
class SavedItem:
    """What a serializer wrote for one pytree.

    Attributes:
        files: all its files.
        leaves: a row for each leaf, in the tree's order.
    """

    files: tuple[FileEntry, ...]
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known of one committed checkpoint without reading its arrays.

    Attributes:
        step: its step; None for one that was saved without a step.
        created: when its files began to be written, with time zone.
        size: the bytes of all its files, manifest apart.
        serializer: the name of the serializer that wrote it.
        items: the names of its pytrees; ``"state"`` is the one that was passed to ``save`` itself.
        metrics: the metrics that ``save`` was given.
        pinned: whether retention must leave it alone until it is unpinned.
    """

    step: int | None
    created: datetime
    size: int
    serializer: str
    items: tuple[str, ...] = ("state",)
    metrics: Mapping[str, float] | None = None
    pinned: bool = False


class StorageBackend(ABC):
    """Objects under one root URL, addressed by keys.

    A key is one or more non-empty names joined by ``"/"``, none of which is ``"."`` or ``".."``; it holds no
    backslash and no control character, and neither it nor a name begins as
    :func:`vibe_store.storage.keys.check_key` says. Anything else raises
    :class:`~vibe_store.errors.InvalidValueError`, and no key leads outside the root, through symbolic links
    either. Keys are taken as they are: not quoted, not normalised, and there are no folders. Only where keys
    are paths may an object at ``"a"`` keep others from being at ``"a/b"``, and the reverse, which raises
    ``IsADirectoryError`` or ``NotADirectoryError``. Errors name the key.

    Every method may be called from any thread. What one call wrote, the next call sees, through another
    storage that is open at the same root too.

    A call that changes something is durable on return: it outlives a power failure, not only the process.
    With ``durable=False`` that may wait, at most until the next change with ``durable=True`` takes effect:
    whoever sees that one after a power failure finds the earlier ones done too.

    Roots nest: an object at ``"run/a"`` is at ``"a"`` under the root whose URL has ``/run`` at its end. A
    storage whose URLs have no such paths holds checkpoints, but no :class:`~vibe_store.RunDir`, which says
    so.

    Implementations take the root URL first and their options as keywords, and create nothing before the first
    write. Their ``repr`` shows no secret.
    """

    url: str
    """The root, as text that a person can read and that :func:`vibe_store.open_storage` would open again, in
    another process and working directory too."""

    concurrency: int = 1
    """How many calls are worth having under way at once: 1 where none of them waits for a network."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Blob]:
        """Yield every object whose key begins with ``prefix``, sorted by key; nothing where there is none.

        ``prefix`` is text, not a folder: ``"step_1"`` also finds ``"step_10/state.eqx"``. Never stale.
        """

    @abstractmethod
    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of one object from ``start`` up to ``end`` (to its end by default).

        A range that reaches past the end of the object gives what there is of it.

        Raises:
            FileNotFoundError: there is no such object.
            InvalidValueError: ``start`` or ``end`` is negative.
        """

    @abstractmethod
    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        """Store a small object, whole or not at all; what is there is replaced. ``data`` is not kept.

        With ``overwrite=False``, of several writers that create one key at the same moment, exactly one
        succeeds. A storage that cannot promise that looks first, and issues a
        :class:`~vibe_store.errors.VibeStoreWarning` when that is asked of it for the first time.

        Raises:
            FileExistsError: ``overwrite=False`` and the object exists; it stays as it was.
        """

    @abstractmethod
    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        """Store a local file of any size, whole or not at all; what is there is replaced.

        With ``move=True`` the storage may take the file itself instead of a copy: afterwards the caller must
        neither use nor expect it.

        Raises:
            FileNotFoundError: there is no such file; the object is as it was.
        """

    @abstractmethod
    def get(self, key: str, target: Path) -> None:
        """Copy an object of any size to a local file, which is replaced; the folders above it are made.

        Raises:
            FileNotFoundError: there is no such object; ``target`` is as it was.
        """

    @abstractmethod
    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        """Remove exactly these objects, in any order; one that does not exist is no error.

        Raises:
            InvalidValueError: one of them is no key, or ``keys`` is one text; nothing was removed.
        """

    def sweep(self) -> None:  # noqa: B027 - most storages leave nothing behind
        """Remove what calls that were cut off left behind (temporary files, unfinished uploads).

        Called only while no other process writes to this root, so only where :meth:`local_path` says where it
        is on a local disk, and it can be locked. Any other storage removes such things by itself, or has the
        store do it after a time. Calls under way in this process are spared.
        """

    def local_path(self, key: str) -> Path | None:
        """Where this key is on a local disk, whether or not it exists; None where the storage is not one.

        ``""`` stands for the root.
        """
        del key
        return None


class Source(ABC):
    """The files of one saved item, for a serializer to load from.

    Nothing unverified comes out of it, unless the user asked for less than ``verify="full"``.
    """

    @property
    @abstractmethod
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaf table that was saved with the item."""

    @property
    @abstractmethod
    def files(self) -> Mapping[str, FileEntry]:
        """The files of the item, by name."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Return a local file that holds the bytes of the named file, already verified.

        Raises:
            CorruptCheckpointError: they are not the bytes that were saved.
        """

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open the named file for reading once from its start to its end, verifying on the way.

        The read that reaches the end raises :class:`~vibe_store.errors.CorruptCheckpointError` when the bytes
        are not those that were saved, so a serializer reads to the end before it returns anything.
        ``readinto`` fills the caller's buffer without another copy.
        """

    @abstractmethod
    def read_part(self, name: str, start: int, buffer: memoryview, checksum: str) -> None:
        """Fill a buffer of bytes with a part of the named file, and read nothing else of it.

        Args:
            name: the file.
            start: where the part begins.
            buffer: as many bytes as there are to read.
            checksum: xxh3-128 of the part, from the leaf table.

        Raises:
            CorruptCheckpointError: the file ends early, or the part is not what was saved.
        """


class Serializer(ABC):
    """Turns pytrees into files of one local folder, and back.

    Options are keywords of its constructor. Each has a default, and none is needed to load: a checkpoint is
    loaded by the serializer that its manifest names, made without options. Their annotations (bool, int,
    float, str, None) say how they are read where a user writes them as text, ``"orbax:compress=true"``. What
    is written so is stored with a run, so none of them is a secret.
    """

    name: str
    """The name by which it is registered; it stands in the manifest of what it wrote."""

    @abstractmethod
    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        """Return all that :meth:`save` needs of the tree, on the host and owned by the snapshot alone.

        Called in the caller's thread. Afterwards the caller may donate its arrays and change its NumPy leaves
        in place; the snapshot does not change. What it is made of is the serializer's own business; the room
        that a save needs is told by the ``nbytes`` of its leaves.

        Args:
            tree: any pytree.
            reuse: an earlier snapshot that nobody uses any more. Its memory may be taken for the new one,
                which spares the time that touching fresh memory takes, often more than the copy itself.

        Raises:
            UnsupportedLeafError: a leaf cannot be stored; the message names its path.
        """

    @abstractmethod
    def save(self, tree: PyTree, directory: Path, item: str) -> SavedItem:
        """Write a tree (or a snapshot of one) into files whose names begin with ``item``, from any thread.

        Files are complete but need not be durable when this returns. Other items of the same checkpoint are
        saved into the same folder.
        """

    @abstractmethod
    def load(self, source: Source, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
        """Return a tree of the structure of ``like`` with the saved leaves, bit for bit.

        Leaves are matched by path. Those of ``like`` may be ``jax.ShapeDtypeStruct``, with or without a
        sharding; their values are not looked at. They decide whether data of one dtype and shape becomes a
        ``jax.Array``, a ``numpy.ndarray`` or a NumPy scalar, and nothing is cast. Arrays own their memory:
        those of JAX can be donated, and are committed only where ``like`` says to which devices; those of
        NumPy are contiguous, and can be written to. A callable is that of ``like``; a
        :class:`~vibe_store.errors.VibeStoreWarning` says where one of another name was saved.

        With ``partial=True`` the checkpoint may hold leaves that ``like`` does not.

        Raises:
            TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
            CorruptCheckpointError: what is stored is not what was saved.
        """


class RetentionPolicy(Protocol):
    """Decides which checkpoints go: a function without side effects, of what it is shown and nothing else.

    Shown what it has left, it deletes nothing more.
    """

    def __call__(self, checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        """Return the steps to delete, out of ``checkpoints``, which are sorted by step."""
        ...


class Checkpointer(ABC):
    """All that a training loop sees of checkpoints.

    Whatever reads (:meth:`restore`, :meth:`all_steps` and so on) sees every save that was made before it.
    """

    @abstractmethod
    def save(
        self,
        step: int,
        pytree: PyTree,
        *,
        items: Mapping[str, PyTree] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Save the state of one step, if the step is one to be saved or ``force`` is set.

        When this returns, the caller may donate and change everything that it passed.

        Args:
            step: 0 or more.
            pytree: the state; it becomes the item ``"state"``.
            items: further pytrees by name, each stored apart, so that each can be loaded without the others.
            metrics: numbers to rank checkpoints by.
            metadata: anything that JSON can hold.
            force: save even though the interval says no.

        Returns:
            True if the step was saved, or is being saved in the background.

        Raises:
            InvalidValueError: the step, a metric or the metadata cannot be stored; nothing was saved.
            UnsupportedLeafError: a leaf cannot be stored; nothing was saved.
            StepAlreadyExistsError: the step is already committed, and stays as it was.
            SaveFailedError: the save before this one failed in the background, or the storage does not say
                whether the step is there; this one was not begun. ``step`` says which one failed.
        """

    @overload
    def restore(
        self, step: int | None, like: PyTree = None, *, items: None = None, partial: bool = False
    ) -> PyTree: ...

    @overload
    def restore(
        self, step: int | None, like: PyTree = None, *, items: Mapping[str, PyTree], partial: bool = False
    ) -> tuple[PyTree, dict[str, PyTree]]: ...

    @abstractmethod
    def restore(
        self,
        step: int | None,
        like: PyTree = None,
        *,
        items: Mapping[str, PyTree] | None = None,
        partial: bool = False,
    ) -> PyTree:
        """Load the state of one step into the structure of ``like``.

        Arrays come back strongly typed, weakly typed ones too, which may promote to other dtypes than before:
        make such an array strong before training, as ``jnp.asarray(0.9, jnp.bfloat16)``.

        Args:
            step: the step; None for the newest one that verifies.
            like: a template, of arrays or of ``jax.ShapeDtypeStruct``. None loads what there is into dicts
                and lists, see :func:`vibe_store.load_checkpoint`.
            items: templates of further items to load, by name.
            partial: allow the checkpoint to hold leaves that a template does not; they are not read, where
                the serializer can do without.

        Returns:
            The state; or, where ``items`` is given, the state and the items by name.

        Raises:
            CheckpointNotFoundError: there is no such step, or no step at all, or no such item.
            TemplateMismatchError: a template and the checkpoint differ.
            CorruptCheckpointError: the step does not verify.
            OSError: the storage failed. No older step is restored instead, as the newest one may be whole.
        """

    @abstractmethod
    def info(self, step: int) -> CheckpointInfo:
        """Return the record of one step, or raise :class:`~vibe_store.errors.CheckpointNotFoundError`."""

    @abstractmethod
    def metadata(self, step: int) -> dict[str, Any] | None:
        """Return the metadata that this step was saved with, or None where there was none.

        Raises:
            CheckpointNotFoundError: there is no such step.
        """

    @abstractmethod
    def latest_step(self) -> int | None:
        """Return the highest committed step, or None."""

    @abstractmethod
    def best_step(self) -> int | None:
        """Return the committed step with the best metric, or None where no step has one."""

    @abstractmethod
    def all_steps(self) -> list[int]:
        """Return every committed step, ascending; a step whose save failed or goes on is not among them."""

    @abstractmethod
    def wait(self) -> None:
        """Block until every save is committed; raise, once, what went wrong in the background."""

    @abstractmethod
    def close(self) -> None:
        """Wait, as :meth:`wait` does, then let go of the directory. Closing twice is no error.

        A save afterwards raises :class:`~vibe_store.errors.CheckpointerClosedError`.
        """

    @property
    def last_committed(self) -> CheckpointInfo | None:
        """The checkpoint that this object committed last, without waiting for one that is under way."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, traceback
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:  # noqa: BLE001 - the body's own error must stay the one that is raised
            error.add_note(f"While leaving the block, closing the checkpointer failed too: {failure}")
