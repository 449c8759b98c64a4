"""Storage options and the credentials in URLs are shown nowhere, whatever a filesystem raises."""

import logging
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vibe_store import open_storage
from vibe_store.checkpoint import (
    CheckpointManager,
    list_checkpoints,
    load_checkpoint,
    load_eqx,
    save_checkpoint,
    save_eqx,
)
from vibe_store.cli import main
from vibe_store.errors import InvalidValueError, VibeStoreError, VibeStoreWarning
from vibe_store.metrics import MetricsLogger, read_metrics
from vibe_store.run_dir import RunDir
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.keys import check_url
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.redaction import redact, secrets_of, without_credentials

SECRET = "hunter2-correct-horse"  # noqa: S105 - this one is to be looked for
NESTED = "hunter2-battery-staple"
PASSWORD = "hunter2-p4ss"  # noqa: S105 - this one too


class Stubborn(Exception):  # noqa: N818 - a name, as others choose theirs
    """Makes its text of a request that it keeps, as those of HTTP clients do."""

    def __init__(self, request: Any) -> None:
        super().__init__(request, {"headers": {"Authorization": SECRET}})
        self.request = request

    def __str__(self) -> str:
        return f"401 for {self.request[0]}"

    def __repr__(self) -> str:
        return f"Stubborn({self.request!r})"


class LoudFileSystem(MemoryFileSystem):
    """Takes a secret, and says it whenever something goes wrong."""

    protocol = "loud"
    cachable = False
    fault: str | None = None

    def __init__(self, secret: str = "", nested: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.secret, self.nested = secret, nested

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = str(path)
        return "/" + (path.partition("@")[2] if "://" in path else path).strip("/")

    def _fail(self, kind: str) -> None:
        if self.fault is None:
            return
        try:
            try:
                raise KeyError(self.secret)
            except KeyError as error:
                raise ConnectionError(f"signed {self.nested}") from error
        except ConnectionError:
            failure: BaseException = {
                "os": OSError(5, f"refused {self.secret}", f"/cred/{self.secret}", None, self.secret),
                "runtime": RuntimeError("no", {"token": self.secret}, [self.nested]),
                "stubborn": Stubborn([self.secret, self.nested]),
                "group": ExceptionGroup(f"all {self.secret}", [ValueError(self.secret), OSError(PASSWORD)]),
                "missing": FileNotFoundError(f"loud://user:{PASSWORD}@host/{kind}"),
            }[self.fault]
            failure.add_note(f"with {self.secret}")
            raise failure  # noqa: B904 - the context is what is tested

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        self._fail("cat")
        return super().cat_file(*arguments, **options)

    def find(self, *arguments: Any, **options: Any) -> Any:
        self._fail("find")
        return super().find(*arguments, **options)

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self._fail("pipe")
        return super().pipe_file(*arguments, **options)

    def put_file(self, *arguments: Any, **options: Any) -> Any:
        self._fail("put")
        return super().put_file(*arguments, **options)

    def get_file(self, *arguments: Any, **options: Any) -> Any:
        self._fail("get")
        return super().get_file(*arguments, **options)

    def info(self, *arguments: Any, **options: Any) -> Any:
        self._fail("info")
        return super().info(*arguments, **options)

    def rm_file(self, *arguments: Any, **options: Any) -> Any:
        self._fail("rm")
        return super().rm_file(*arguments, **options)


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    fsspec.register_implementation("loud", LoudFileSystem, clobber=True)
    yield
    LoudFileSystem.fault = None


OPTIONS = {"secret": SECRET, "nested": {"headers": [{"Authorization": NESTED}]}}


def _url() -> str:
    return f"loud://user:{PASSWORD}@host/{uuid.uuid4().hex}"


def _shown(error: BaseException) -> str:
    """All that any printer of exceptions shows: texts, notes and attributes of the whole chain."""
    seen: list[str] = []
    left: list[BaseException] = [error]
    known: set[int] = set()
    while left:
        each = left.pop()
        if id(each) in known:
            continue
        known.add(id(each))
        seen += [str(each), repr(each), *getattr(each, "__notes__", [])]
        seen += [str(getattr(each, name, "")) for name in ("strerror", "filename", "filename2")]
        left += [inner for inner in (each.__cause__, each.__context__) if inner is not None]
        left += getattr(each, "exceptions", ())
    return "\n".join([*seen, "".join(traceback.format_exception(error))])


def _check(text: str) -> None:
    assert "hunter2" not in text


@pytest.mark.filterwarnings("ignore:.*cannot create an object only if")
@pytest.mark.parametrize("fault", ["os", "runtime", "stubborn", "group", "missing"])
def test_no_secret_is_in_what_a_filesystem_raises(fault: str, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    url = _url()
    storage = open_storage(url, **OPTIONS)
    save_checkpoint(storage, 1, step=1)
    storage.write("key", b"data")
    metrics = MetricsLogger(f"{url}/m.jsonl", storage_options=OPTIONS)
    LoudFileSystem.fault = fault
    (tmp_path / "file").write_bytes(b"data")
    doors = {
        "read": lambda: storage.read("key"),
        "part": lambda: storage.read("key", 1, 2),
        "list": lambda: list(storage.list()),
        "write": lambda: storage.write("key", b""),
        "create": lambda: storage.write("other", b"", overwrite=False),
        "put": lambda: storage.put(tmp_path / "file", "key"),
        "get": lambda: storage.get("key", tmp_path / "target"),
        "delete": lambda: storage.delete(["key"]),
        "sweep": storage.sweep,
        "save_checkpoint": lambda: save_checkpoint(url, 1, step=2, storage_options=OPTIONS),
        "load_checkpoint": lambda: load_checkpoint(url, 1, step=1, storage_options=OPTIONS),
        "list_checkpoints": lambda: list_checkpoints(url, storage_options=OPTIONS),
        "manager": lambda: _save_in_background(url),
        "run": lambda: RunDir("run", base_dir=url, storage_options=OPTIONS),
        "config": RunDir(base_dir=url, run_id="run", storage_options=OPTIONS).load_config,
        "load_eqx": lambda: load_eqx(f"{url}/step_1/state.eqx", storage_options=OPTIONS),
        "save_eqx": lambda: save_eqx(f"{url}/state.eqx", 1),
        "open metrics": lambda: MetricsLogger(f"{url}/m.jsonl", storage_options=OPTIONS),
        "read metrics": lambda: read_metrics(f"{url}/m.jsonl", storage_options=OPTIONS),
        "metrics": lambda: _flush(metrics),
    }
    raised = 0
    for door in doors.values():
        try:
            door()
        except Exception as error:  # noqa: BLE001 - whatever it is
            raised += 1
            _check(_shown(error))
    assert raised > 6
    _check(caplog.text)


def _flush(metrics: MetricsLogger) -> None:
    metrics.write({"step": 1})
    metrics.close()


def _save_in_background(url: str) -> None:
    with CheckpointManager(url, storage_options=OPTIONS) as manager:
        manager.save(3, 1)
        manager.save(4, 1)


def test_an_error_keeps_its_type_its_number_and_its_other_words() -> None:
    for error in (OSError(28, f"No space for {SECRET}", "/a"), Stubborn([SECRET])):
        kind, words = type(error), str(error).replace(SECRET, "***")
        redact(error, [SECRET])
        assert isinstance(error, kind)
        assert type(error).__name__ == kind.__name__
        assert str(error) == words
    plain = OSError(28, "No space left", "/a")
    redact(plain, [SECRET])
    assert plain.errno == 28
    assert type(plain) is OSError


@pytest.mark.filterwarnings("ignore:.*cannot create an object only if")
def test_no_secret_is_in_a_representation_a_log_or_a_manifest(caplog: Any, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    url = _url()
    with CheckpointManager(url, storage_options=OPTIONS, max_to_keep=1) as manager:
        for step in range(3):
            manager.save(step, step, metadata={"step": step}, metrics={"loss": 0.5})
        manager.wait()
        _check(f"{manager!r} {manager!s}")
    storage = open_storage(url, **OPTIONS)
    assert isinstance(storage, FsspecStorage)
    _check(f"{storage!r} {storage!s} {storage.url}")
    assert storage.url.startswith("loud://user@host/")
    assert manager.all_steps() == [2]
    for blob in storage.list():
        _check(storage.read(blob.key).decode("latin-1"))
    _check(caplog.text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", [TypeError, RuntimeError, ValueError, ImportError, OSError])
def test_no_secret_is_in_what_a_filesystem_raises_while_it_is_made(fault: type[Exception]) -> None:
    class Refusing(LoudFileSystem):
        protocol = "refusing"

        def __init__(self, secret: str = "", **_: Any) -> None:
            raise fault(f"{secret} and {PASSWORD} are refused")

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(Exception, match="refused") as caught:
        open_storage(_url().replace("loud", "refusing"), **OPTIONS)
    _check(_shown(caught.value))


URLS = {
    f"loud://user:{PASSWORD}@host/a@b": "loud://user@host/a@b",
    f"sftp://user:{PASSWORD}@ss@host/a": "sftp://user@host/a",
    f"ftp://user:{PASSWORD}/slash@host/a": "ftp://user@host/a",
    f"s3://KEY:{PASSWORD}@bucket/a": "s3://KEY@bucket/a",
    f"https://{PASSWORD}@host/a": "https://***@host/a",
    f"https://{PASSWORD}:x-oauth-basic@host/a": "https://***@host/a",
    f"https://host/a?sig={PASSWORD}&b=c": "https://host/a?***",
    f"simplecache::ftp://user:{PASSWORD}@host/a": "simplecache::ftp://user@host/a",
    f"zip://x.npz::https://host/a.zip?token={PASSWORD}": "zip://x.npz::https://host/a.zip?***",
    "abfs://container@account.dfs.core.windows.net/a": "abfs://container@account.dfs.core.windows.net/a",
    "http://localhost:9000/a@b": "http://localhost:9000/a@b",
    "s3://bucket/a:b@c?": "s3://bucket/a:b@c?",
    "memory://a": "memory://a",
}


@pytest.mark.parametrize(("url", "shown"), URLS.items(), ids=range(len(URLS)))
def test_credentials_in_a_url_are_not_shown(url: str, shown: str) -> None:
    assert without_credentials(url) == shown
    if "hunter2" in url:
        assert any(PASSWORD in secret for secret in secrets_of(url, {}))


@pytest.mark.parametrize("url", [url for url in URLS if "hunter2" in url])
def test_a_url_that_cannot_be_opened_is_named_without_its_credentials(url: str, capsys: Any) -> None:
    doors = [
        lambda: check_url(url.replace("://", ":/", 1)),
        lambda: check_url(url + "\0"),
        lambda: LocalStorage(url),
        lambda: open_storage(url.replace("://", ":/", 1)),
        lambda: open_storage(f"nope+{url}"),
        lambda: FsspecStorage(f"nope+{url}"),
    ]
    refused = 0
    for door in doors:
        try:
            door()
        except VibeStoreError as error:
            refused += 1
            _check(_shown(error))
    assert refused >= 3
    for command in ("ls", "show", "verify"):
        main([command, f"nope+{url}"])
        shown = capsys.readouterr()
        _check(shown.out + shown.err)


@pytest.mark.filterwarnings("ignore:.*cannot create an object only if it does not exist")
@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["show"], ["show", "--json"], ["verify"]])
def test_the_command_shows_no_credentials(arguments: list[str], capsys: Any) -> None:
    url = _url()
    for step in range(2):
        main([arguments[0], url, *arguments[1:]])
        shown = capsys.readouterr()
        assert shown.out + shown.err
        _check(shown.out + shown.err)
        save_checkpoint(url, 1, step=step)


def test_the_warning_of_a_race_shows_no_credentials() -> None:
    storage = open_storage(_url(), **OPTIONS)
    with pytest.warns(UserWarning, match="cannot create") as warned:
        storage.write("key", b"", overwrite=False)
    _check(str(warned[0].message))


def test_a_run_directory_quotes_no_credentials() -> None:
    run = RunDir(base_dir=_url(), run_id="mine", storage_options=OPTIONS)
    _check(f"{run!r} {run.path!r} {run.list_checkpoints()!r} {run.log_path()!r}")
    with pytest.raises(InvalidValueError) as caught:
        RunDir("run", base_dir=_url().replace("://", ":/"))
    _check(str(caught.value))
    run.mark_best(1)
    with pytest.warns(VibeStoreWarning, match="which is not there") as warned:
        assert run.best_checkpoint is None
    _check(str(warned[0].message))
    open_storage(str(run.path), **OPTIONS).write("config.json", b"{")
    with pytest.raises(InvalidValueError) as caught:
        run.load_config()
    _check(str(caught.value))
