"""Saving and restoring beside Equinox, Orbax, safetensors and the disk itself.

Each repeat runs every contender in turn, in another order each time, on one state. The figures are medians,
and each ratio is the median of the paired ratios to the limit, with the 95 % interval of that median. The
limit of saving is the same bytes written and fsynced once; that of restoring is the same bytes read into new
arrays. Files are warm in the page cache when they are read. Memory is measured apart, in a new process for
each contender: how far the peak of the resident memory rises, at a save, above what it was with the state in
place::

    pip install "vibe-store[orbax]" safetensors
    python benchmarks/checkpoint.py [--state 1MB 300MB 1GB] [--repeats 15] [--folder DIR]
"""

import argparse
import gc
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from vibe_store import CheckpointManager, load_checkpoint, save_checkpoint

State = dict[str, jax.Array]
MB = 1_000_000


def small() -> State:
    """1 MB in 19 leaves, most of it in two: a network of a reinforcement learner and its optimiser."""
    shapes = [(256, 256)] * 3 + [(256, 64)] * 2 + [(256,)] * 8 + [(4, 256)] * 3 + [()] * 3
    return arrays(shapes)


def replay() -> State:
    """300 MB, half of it a replay buffer in two leaves."""
    return arrays([(1_000, 2_500)] * 15 + [(5_000_000, 4), (17_500_000,)])


def large() -> State:
    """1 GB in 50 leaves."""
    return arrays([(2_000, 2_500)] * 50)


STATES = {"1MB": small, "300MB": replay, "1GB": large}


def arrays(shapes: list[tuple[int, ...]]) -> State:
    generator = np.random.default_rng(0)
    state = {
        f"leaf_{index:02}": jax.device_put(generator.standard_normal(shape, np.float32))
        for index, shape in enumerate(shapes)
    }
    return jax.block_until_ready(state)


@dataclass(frozen=True)
class Contender:
    """A way to save and restore.

    Attributes:
        save: begins to save into a folder and returns what waits until it is done; the caller may change the
            state once it has returned.
        restore: loads what was saved there, into arrays like those of the state.
        remove: removes what was saved in another folder than that one.
    """

    save: Callable[[State, Path], Callable[[], None]]
    restore: Callable[[State, Path], Any]
    remove: Callable[[], None] = lambda: None


def done() -> None:
    """Wait for a save that has no background."""


def sync(folder: Path) -> None:
    """Make the files of a folder durable, for those who don't do it themselves."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_bytes(state: State, folder: Path) -> Callable[[], None]:
    with (folder / "bytes").open("wb", buffering=0) as file:
        for leaf in state.values():
            view = memoryview(leaf).cast("B") if leaf.ndim else np.asarray(leaf).tobytes()
            while len(view):
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return done


def read_bytes(state: State, folder: Path) -> Any:
    """Read into memory like that of the state's arrays; to touch fresh memory takes longer than to read."""
    arrays = [np.empty(leaf.nbytes, np.uint8) for leaf in state.values()]
    with (folder / "bytes").open("rb", buffering=0) as file:
        for array in arrays:
            buffer = memoryview(array)
            while buffer:
                buffer = buffer[file.readinto(buffer[: 4 * MB]) :]
    return arrays


def save_ours(serializer: str) -> Callable[[State, Path], Callable[[], None]]:
    def save(state: State, folder: Path) -> Callable[[], None]:
        save_checkpoint(folder, state, step=1, serializer=serializer)
        return done

    return save


def restore_ours(state: State, folder: Path) -> Any:
    return load_checkpoint(folder, state, step=1)


class Managed:
    """One manager for all repeats, as a training run has it: the memory of its snapshot is used again.

    With ``keep`` it deletes the step before once a save is committed, which nobody else here does: the time
    until all is done then includes that.
    """

    def __init__(self, serializer: str, *, keep: int | None = None) -> None:
        self._serializer, self._keep, self._step = serializer, keep, 0
        self._manager: CheckpointManager | None = None
        self._run = Path()

    def contender(self) -> Contender:
        return Contender(self.save, self.restore, self.remove)

    def save(self, state: State, folder: Path) -> Callable[[], None]:
        if self._manager is None:
            self._run = folder.parent / f"run_{self._serializer}_{self._keep}"
            keep = 10**9 if self._keep is None else self._keep
            self._manager = CheckpointManager(self._run, max_to_keep=keep, serializer=self._serializer)
        self._step += 1
        self._manager.save(self._step, state)
        return self._manager.wait

    def restore(self, state: State, _folder: Path) -> Any:
        assert self._manager is not None
        return self._manager.restore(None, state)

    def remove(self) -> None:
        if self._keep is None:
            shutil.rmtree(self._run / f"step_{self._step}")


def save_equinox(*, durable: bool) -> Callable[[State, Path], Callable[[], None]]:
    def save(state: State, folder: Path) -> Callable[[], None]:
        eqx.tree_serialise_leaves(folder / "state.eqx", state)
        if durable:
            sync(folder)
        return done

    return save


def restore_equinox(state: State, folder: Path) -> Any:
    return eqx.tree_deserialise_leaves(folder / "state.eqx", state)


def save_safetensors(state: State, folder: Path) -> Callable[[], None]:
    save_file({name: np.asarray(leaf) for name, leaf in state.items()}, folder / "state.safetensors")
    sync(folder)
    return done


def restore_safetensors(_state: State, folder: Path) -> Any:
    return jax.device_put(load_file(folder / "state.safetensors"))


def save_orbax(state: State, folder: Path) -> Callable[[], None]:
    ocp.save(folder / "state", state)
    sync(folder)
    return done


def save_orbax_async(state: State, folder: Path) -> Callable[[], None]:
    response = ocp.save_async(folder / "state", state)

    def wait() -> None:
        response.result()
        sync(folder)

    return wait


def restore_orbax(state: State, folder: Path) -> Any:
    return ocp.load(folder / "state", state)


def contenders() -> dict[str, Contender]:
    return {
        LIMIT: Contender(write_bytes, read_bytes),
        "vibe_store": Contender(save_ours("eqx"), restore_ours),
        "vibe_store manager": Managed("eqx").contender(),
        "vibe_store manager, keep 1": Managed("eqx", keep=1).contender(),
        "vibe_store orbax": Contender(save_ours("orbax"), restore_ours),
        "vibe_store orbax manager": Managed("orbax").contender(),
        "equinox": Contender(save_equinox(durable=False), restore_equinox),
        "equinox + fsync": Contender(save_equinox(durable=True), restore_equinox),
        "safetensors + fsync": Contender(save_safetensors, restore_safetensors),
        "orbax + fsync": Contender(save_orbax, restore_orbax),
        "orbax async + fsync": Contender(save_orbax_async, restore_orbax),
    }


LIMIT = "write + fsync, read"
FIGURES = ("blocking", "durable", "restore")


def measure(contender: Contender, state: State, folder: Path) -> tuple[float, float, float]:
    """Return the seconds until ``save`` returns, until all is durable, and of a restore."""
    folder.mkdir(parents=True)
    gc.collect()
    os.sync()
    began = time.perf_counter()
    wait = contender.save(state, folder)
    blocked = time.perf_counter() - began
    wait()
    durable = time.perf_counter() - began
    gc.collect()
    began = time.perf_counter()
    restored = contender.restore(state, folder)
    jax.block_until_ready(restored)
    restore = time.perf_counter() - began
    shutil.rmtree(folder)
    contender.remove()
    return blocked, durable, restore


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, from order statistics."""
    ordered, count = sorted(ratios), len(ratios)
    chance, index = 0.5**count, 0
    while chance < 0.025 and index < count // 2:
        index += 1
        chance += math.comb(count, index) * 0.5**count
    index = max(0, index - 1)
    return ordered[index], ordered[count - 1 - index]


def compare(name: str, repeats: int, root: Path) -> None:
    state, all_of_them = STATES[name](), contenders()
    size = sum(leaf.nbytes for leaf in state.values())
    print(f"\n{name}: {size / MB:.0f} MB in {len(state)} leaves, {repeats} repeats")
    for contender in all_of_them.values():  # whatever is compiled or imported at first use
        measure(contender, state, root / "warm-up")
    seconds: dict[str, list[tuple[float, float, float]]] = {contender: [] for contender in all_of_them}
    for repeat in range(repeats):
        order = list(all_of_them)
        random.Random(repeat).shuffle(order)
        for contender in order:
            seconds[contender].append(measure(all_of_them[contender], state, root / "state"))
    print(
        f"{'':28}"
        + "".join(f"{figure:>12}{'ratio':>8}{'interval':>17}" for figure in FIGURES)
        + f"{'memory':>10}"
    )
    for contender, mine in seconds.items():
        cells = []
        for index in range(len(FIGURES)):
            limits = [row[1 if index == 0 else index] for row in seconds[LIMIT]]
            ratios = [row[index] / limit for row, limit in zip(mine, limits, strict=True)]
            low, high = interval(ratios)
            cells.append(
                f"{statistics.median(row[index] for row in mine) * 1e3:>9.1f} ms"
                f"{statistics.median(ratios):>8.2f}{f'{low:.2f} to {high:.2f}':>17}"
            )
        print(f"{contender:28}{''.join(cells)}{peak_memory(name, contender, root) / MB:>7.0f} MB", flush=True)


def peak_memory(state: str, contender: str, root: Path) -> float:
    """Return the bytes that saving adds to the resident memory of a process at its peak."""
    command = [sys.executable, __file__, "--measure-memory", state, contender, "--folder", str(root)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(ran.stdout.splitlines()[-1]))


def measure_memory(name: str, contender: str, root: Path) -> None:
    way = contenders()[contender]
    measure(way, {"tiny": jax.numpy.zeros(3)}, root / "memory-warm-up")
    state = STATES[name]()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    (root / "memory").mkdir(parents=True)
    way.save(state, root / "memory")()
    print(json.dumps(resident("VmHWM") - before))
    shutil.rmtree(root / "memory")


def resident(field: str) -> int:
    """Return a figure of Linux about this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="vibe_store-benchmark-") as folder:
        if options.measure_memory:
            measure_memory(*options.measure_memory, Path(folder))
            return
        for name in options.state:
            root = Path(folder) / name  # what the managers of one state leave is none of the next one's
            root.mkdir()
            compare(name, options.repeats, root)


if __name__ == "__main__":
    main()
