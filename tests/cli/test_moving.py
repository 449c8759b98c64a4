"""``vibe-store copy`` and ``prune``, and storage options on the command line."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import CopyProgress, copy_checkpoints, verify_checkpoint
from vibe_store.checkpoint.step_index import committed_steps
from vibe_store.cli import moving
from vibe_store.errors import WriterLockedError
from vibe_store.storage.local import LocalStorage

Run = Callable[..., Any]


def _steps(directory: Path) -> list[int]:
    return committed_steps(LocalStorage(str(directory)))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json")


def _mark_best(run_path: Path, step: int) -> None:
    (run_path / "checkpoints" / "best").symlink_to(f"step_{step}")


def test_copy_says_what_it_copied_and_the_next_time_that_it_is_there(
    vibe_store: Run, run_path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    ran = vibe_store("copy", run_path, target)
    assert (ran.status, ran.err) == (0, "")
    first, second, last = ran.out.splitlines()
    assert (first, second) == ("step 10 copied (1 of 2)", "step 20 copied (2 of 2)")
    assert last.startswith("Copied 2 checkpoints (")
    assert last.endswith(f" KiB) to {target}.")
    assert verify_checkpoint(target) == []
    again = vibe_store("copy", run_path, target)
    assert again.out == f"Copied 0 checkpoints (0 B) to {target}; 2 were there already.\n"


def test_copy_as_json_has_the_documented_keys(vibe_store: Run, run_path: Path, tmp_path: Path) -> None:
    checkpoints = run_path / "checkpoints"
    vibe_store("copy", run_path, tmp_path / "copy", "--steps", "10")
    ran = vibe_store("copy", run_path, tmp_path / "copy", "--json")
    assert json.loads(ran.out) == {
        "source": str(checkpoints),
        "target": str(tmp_path / "copy"),
        "copied": [20],
        "skipped": [10],
        "size": _size(checkpoints / "step_20"),
    }


@pytest.mark.parametrize(
    ("chosen", "copied"),
    [([], [10, 20]), (["--steps", "20", "10"], [10, 20]), (["--best"], [10]), (["--newest"], [20])],
)
def test_copy_copies_the_steps_that_are_chosen(
    vibe_store: Run, run_path: Path, tmp_path: Path, chosen: list[str], copied: list[int]
) -> None:
    _mark_best(run_path, 10)
    assert vibe_store("copy", run_path, tmp_path / "copy", *chosen).status == 0
    assert _steps(tmp_path / "copy") == copied


def test_copy_takes_one_step_by_its_folder(vibe_store: Run, run_path: Path, tmp_path: Path) -> None:
    assert vibe_store("copy", run_path / "checkpoints" / "step_10", tmp_path / "copy").status == 0
    assert _steps(tmp_path / "copy") == [10]
    ran = vibe_store("copy", run_path / "checkpoints" / "step_10", tmp_path / "copy", "--steps", "20")
    assert ran.status == 1
    assert ran.err.startswith(f"error: {run_path}/checkpoints/step_10 is step 10 itself.")


def test_copy_into_a_run_goes_to_its_checkpoints(vibe_store: Run, run_path: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_path, tmp_path / "other"))
    shutil.rmtree(other / "checkpoints" / "step_10")
    assert vibe_store("copy", run_path, other).status == 0
    assert _steps(other / "checkpoints") == [10, 20]


def test_copy_into_the_folder_of_a_step_is_refused(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("copy", run_path, run_path / "checkpoints" / "step_10")
    assert (ran.status, ran.out) == (1, "")
    assert "is the folder of one step" in ran.err


def test_copy_of_a_damaged_step_copies_the_others_and_ends_with_1(
    vibe_store: Run, run_path: Path, tmp_path: Path
) -> None:
    file = run_path / "checkpoints" / "step_10" / "state.eqx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    ran = vibe_store("copy", run_path, tmp_path / "copy")
    assert ran.status == 1
    assert ran.err.startswith(f"error: step 10 in {run_path}/checkpoints does not verify and was not copied")
    assert _steps(tmp_path / "copy") == [20]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--best", "--newest"], "give one of --steps, --best and --newest."),
        (["--steps", "10", "--newest"], "give one of --steps, --best and --newest."),
        (["--steps", "ten"], "a step is a whole number, 0 or more; 'ten' is none."),
    ],
)
def test_a_mistake_in_the_arguments_of_copy_ends_with_2(
    vibe_store: Run, run_path: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    ran = vibe_store("copy", run_path, tmp_path / "copy", *arguments)
    assert (ran.status, ran.out, ran.err) == (2, "", f"error: {said}\n")
    assert not (tmp_path / "copy").exists()


def test_copy_of_what_is_not_there_is_an_error(vibe_store: Run, run_path: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ([tmp_path / "nowhere"], f"There is no directory {tmp_path}/nowhere."),
        ([run_path, "--best"], f"There is no `best` in {run_path}/checkpoints."),
        (
            [run_path, "--steps", "7"],
            f"There is no committed checkpoint of step 7 in {run_path}/checkpoints;",
        ),
    ):
        ran = vibe_store("copy", arguments[0], tmp_path / "copy", *arguments[1:])
        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith(f"error: {said}")
    assert not (tmp_path / "copy").exists()


def test_copy_that_is_interrupted_says_how_to_go_on(
    vibe_store: Run, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*places: Any, on_progress: Callable[[CopyProgress], None], **options: Any) -> Any:
        def tell(progress: CopyProgress) -> None:
            on_progress(progress)
            if progress.step == 20:
                raise KeyboardInterrupt

        return copy_checkpoints(*places, on_progress=tell, **options)

    monkeypatch.setattr(moving, "copy_checkpoints", interrupted)
    ran = vibe_store("copy", run_path, tmp_path / "copy")
    assert ran.status == 130
    assert "Copied 1 checkpoint, whole. Run the same command again to go on." in ran.err
    assert _steps(tmp_path / "copy") == [10]
    monkeypatch.undo()
    assert vibe_store("copy", run_path, tmp_path / "copy").status == 0
    assert _steps(tmp_path / "copy") == [10, 20]


def test_copy_shows_bytes_and_steps_on_a_terminal(
    vibe_store: Run, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    ran = vibe_store("copy", run_path, tmp_path / "copy")
    assert ran.status == 0
    assert "step 20 copied (2 of 2)" in ran.out
    assert "KiB" in ran.out.partition("Copied 2")[0]
    assert "\x1b[" in ran.out


def test_prune_says_what_goes_and_what_stays(vibe_store: Run, run_path: Path) -> None:
    checkpoints = run_path / "checkpoints"
    would = vibe_store("prune", run_path, "--keep", "1", "--dry-run")
    assert (would.status, would.err) == (0, "")
    goes, stays, last = would.out.splitlines()
    assert goes.startswith("would delete step 10 (")
    assert stays.startswith("keep step 20 (")
    assert last.startswith(f"Would delete 1 of 2 checkpoints in {checkpoints} (")
    assert last.endswith("; nothing was changed.")
    assert _steps(checkpoints) == [10, 20]
    ran = vibe_store("prune", run_path, "--keep", "1")
    assert ran.status == 0
    assert ran.out.splitlines()[:2] == [goes.replace("would delete", "deleted"), stays]
    assert _steps(checkpoints) == [20]


def test_prune_as_json_has_the_documented_keys(vibe_store: Run, run_path: Path) -> None:
    sizes = {step: _size(run_path / "checkpoints" / f"step_{step}") for step in (10, 20)}
    ran = vibe_store("prune", run_path, "--keep", "1", "--dry-run", "--json")
    assert json.loads(ran.out) == {
        "directory": str(run_path / "checkpoints"),
        "dry_run": True,
        "deleted": [{"step": 10, "size": sizes[10]}],
        "kept": [{"step": 20, "size": sizes[20]}],
    }


@pytest.mark.parametrize(
    "protection", [["--keep-period", "10"], ["--best", "eval_return", "--mode", "max"], ["marked"]]
)
def test_prune_protects_what_it_is_told_to(vibe_store: Run, run_path: Path, protection: list[str]) -> None:
    if protection == ["marked"]:
        _mark_best(run_path, 10)
        protection = []
    assert vibe_store("prune", run_path, "--keep", "1", *protection).status == 0
    assert _steps(run_path / "checkpoints") == [10, 20]


def test_prune_keeps_what_a_named_policy_keeps(vibe_store: Run, run_path: Path) -> None:
    policy = ("--retention", "every_steps:interval=20")
    would = vibe_store("prune", run_path, *policy, "--dry-run")
    assert would.out.startswith("would delete step 10 (")
    assert vibe_store("prune", run_path, *policy, "--keep", "2").out.startswith("keep step 10 (")
    assert vibe_store("prune", run_path, *policy).status == 0
    assert _steps(run_path / "checkpoints") == [20]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--keep", "1", "--best", "loss", "--mode", "min"], 1, "for the metric 'loss'"),
        (["--keep", "1", "--best", "eval_return"], 2, "--best METRIC and --mode go together"),
        (["--keep", "1", "--mode", "max"], 2, "--best METRIC and --mode go together"),
        (["--keep", "0"], 2, "--keep is 1 or more; got 0."),
        (["--keep", "1", "--keep-period", "0"], 2, "--keep-period is 1 or more; got 0."),
        ([], 2, "give --keep N or --retention POLICY, or both"),
        (["--retention", "nobody"], 1, "There is no retention policy 'nobody'"),
        (["--retention", "latest:keep=1"], 1, "'latest' takes max_to_keep; 'keep' is none of them"),
    ],
)
def test_a_mistake_in_the_arguments_of_prune_deletes_nothing(
    vibe_store: Run, run_path: Path, arguments: list[str], status: int, said: str
) -> None:
    ran = vibe_store("prune", run_path, *arguments)
    assert (ran.status, ran.out) == (status, "")
    assert said in ran.err
    assert _steps(run_path / "checkpoints") == [10, 20]


def test_prune_of_one_step_is_refused(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("prune", run_path / "checkpoints" / "step_10", "--keep", "1")
    assert (ran.status, ran.out) == (1, "")
    assert "is one checkpoint. Give the directory around it" in ran.err
    assert _steps(run_path / "checkpoints") == [10, 20]


def test_prune_of_a_locked_directory_is_an_error(
    vibe_store: Run, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any) -> None:
        raise WriterLockedError("It is being written to.")

    monkeypatch.setattr("vibe_store.checkpoint.pruning.become_writer", locked)
    ran = vibe_store("prune", run_path, "--keep", "1")
    assert (ran.status, ran.err) == (1, "error: It is being written to.\n")
    assert vibe_store("prune", run_path, "--keep", "1", "--dry-run").status == 0


_EACH = [
    (["ls"], [], "--storage-options"),
    (["show"], [], "--storage-options"),
    (["verify"], [], "--storage-options"),
    (["prune"], ["--keep", "1"], "--storage-options"),
    (["copy"], ["elsewhere"], "--source-options"),
    (["copy"], ["elsewhere"], "--target-options"),
]
each_command = pytest.mark.parametrize(("command", "more", "name"), _EACH)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"secret": "tiptop"', "is no JSON at character 20"),
        ('"tiptop"', "is no JSON object"),
        ('{"secret": tiptop}', "is no JSON at character 12"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
@each_command
def test_storage_options_that_are_none_are_refused_in_one_sentence_that_shows_nothing_of_them(
    vibe_store: Run, run_path: Path, command: list[str], more: list[str], name: str, text: str, said: str
) -> None:
    ran = vibe_store(*command, run_path, *more, name, text)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {name} {said}; write it as ")
    assert ran.err.count("\n") == 1
    assert "tiptop" not in ran.err


@pytest.mark.parametrize("kind", ["s3", pytest.param("gcs", marks=pytest.mark.proof)])
def test_every_command_takes_the_options_of_a_bucket_and_shows_none(
    vibe_store: Run, run_path: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    bucket: Any = request.getfixturevalue(kind)
    url = f"{bucket.url}/{uuid.uuid4().hex}"
    options = json.dumps(bucket.storage_options)
    said = [
        vibe_store("copy", run_path, url, "--target-options", options),
        vibe_store("ls", url, "--storage-options", options),
        vibe_store("show", url, "20", "--storage-options", options),
        vibe_store("verify", url, "--storage-options", options),
        vibe_store("copy", url, tmp_path / "back", "--source-options", options, "--newest"),
        vibe_store("prune", url, "--keep", "1", "--storage-options", options),
    ]
    assert [ran.status for ran in said] == [0] * len(said)
    assert said[3].out == f"2 checkpoints in {url}: all as they were saved.\n"
    assert said[5].out.splitlines()[-1].startswith(f"Deleted 1 of 2 checkpoints in {url} (")
    assert _steps(tmp_path / "back") == [20]
    original, back = run_path / "checkpoints" / "step_20", tmp_path / "back" / "step_20"
    names = sorted(file.name for file in original.iterdir())
    assert sorted(file.name for file in back.iterdir()) == names
    assert all(
        (original / name).read_bytes() == (back / name).read_bytes()
        for name in names
        if name != "manifest.json"
    )
    hidden = [bucket.server, *(bucket.storage_options.get(name) for name in ("key", "secret", "token"))]
    shown = "".join(ran.out + ran.err for ran in said)
    assert not [text for text in hidden if text and text in shown]


@pytest.mark.parametrize(
    "command", [("prune", "", "--keep", "1"), ("copy", "", "x"), ("ls", ""), ("eval", "")]
)
def test_an_empty_directory_is_not_the_current_folder(
    vibe_store: Run, run_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(run_path)
    ran = vibe_store(*command)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: The directory is empty text; give its path, ")
    assert sorted(path.name for path in (run_path / "checkpoints").glob("step_*")) == ["step_10", "step_20"]
