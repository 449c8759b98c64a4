"""``vibe-store ls``, ``show`` and ``verify`` on real checkpoints."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls_shows_each_step_with_its_metrics_and_marks(vibe_store: Run, run_path: Path) -> None:
    (run_path / "checkpoints" / "best").symlink_to("step_10")
    hand_written = run_path / "checkpoints" / "step_30"
    hand_written.mkdir()
    (hand_written / "state.eqx").write_bytes(b"x")
    flip_a_bit(run_path / "checkpoints" / "step_20" / "manifest.json")
    ran = vibe_store("ls", run_path)
    assert (ran.status, ran.err) == (0, "")
    header, ten, twenty, thirty = (line.split() for line in ran.out.splitlines())
    assert header == ["STEP", "CREATED", "SIZE", "ITEMS", "METRICS"]
    assert ten[0] == "10"
    assert ten[-4:] == ["state,", "runner", "eval_return=12.5", "best"]
    assert twenty == ["20", "-", "-", "-", "-", "damaged"]
    assert thirty == ["30", "-", "-", "-", "-", "unverified"]


def test_ls_as_json_has_the_documented_keys(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("ls", run_path, "--json")
    listing = json.loads(ran.out)
    assert listing["directory"] == str(run_path / "checkpoints")
    ten, twenty = listing["checkpoints"]
    assert ten.pop("created") < twenty.pop("created")
    size = ten.pop("size")
    assert size == sum(
        file.stat().st_size
        for file in (run_path / "checkpoints" / "step_10").iterdir()
        if file.name != "manifest.json"
    )
    assert ten == {
        "step": 10,
        "status": "committed",
        "best": False,
        "serializer": "eqx",
        "items": ["state", "runner"],
        "metrics": {"eval_return": 12.5},
        "pinned": False,
    }
    assert twenty["metrics"] == {"eval_return": "NaN"}


def test_ls_as_json_has_null_where_nothing_is_committed(vibe_store: Run, run_path: Path) -> None:
    (run_path / "checkpoints" / "step_20" / "manifest.json").unlink()
    (entry,) = json.loads(vibe_store("ls", run_path, "--json").out)["checkpoints"][1:]
    assert entry["status"] == "unverified"
    assert {entry[key] for key in ("created", "size", "serializer", "items", "metrics", "pinned")} == {None}


def test_the_directory_may_be_the_run_the_checkpoints_one_step_or_best(
    vibe_store: Run, run_path: Path
) -> None:
    checkpoints = run_path / "checkpoints"
    (checkpoints / "best").symlink_to("step_10")

    def steps(directory: Path) -> list[int]:
        by_path, by_url = (
            [entry["step"] for entry in json.loads(vibe_store("ls", place, "--json").out)["checkpoints"]]
            for place in (directory, f"file://{directory}")
        )
        assert by_path == by_url
        return by_path

    assert steps(run_path) == steps(checkpoints) == [10, 20]
    assert steps(checkpoints / "step_20") == [20]
    assert steps(checkpoints / "best") == [10]


def test_the_directory_may_be_a_url(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("ls", f"file://{run_path}/checkpoints", "--json")
    assert [entry["step"] for entry in json.loads(ran.out)["checkpoints"]] == [10, 20]


def test_ls_of_an_empty_directory_says_so(vibe_store: Run, tmp_path: Path) -> None:
    ran = vibe_store("ls", tmp_path)
    assert (ran.status, ran.out) == (0, f"No steps in {tmp_path}.\n")


def test_ls_of_a_checkpoint_without_a_step_says_how_to_see_it(vibe_store: Run, tmp_path: Path) -> None:
    from vibe_store.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "one", {"a": 1})
    assert f"`vibe-store show {tmp_path / 'one'}`" in vibe_store("ls", tmp_path / "one").out
    shown = json.loads(vibe_store("show", tmp_path / "one", "--json").out)
    assert (shown["step"], list(shown["items"])) == (None, ["state"])
    verified = json.loads(vibe_store("verify", tmp_path / "one", "--json").out)
    assert (verified["checked"], verified["ok"]) == ([None], True)


def test_verify_of_a_damaged_checkpoint_without_a_step_names_it(vibe_store: Run, tmp_path: Path) -> None:
    from vibe_store.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "one", {"a": 1})
    flip_a_bit(tmp_path / "one" / "manifest.json")
    verified = json.loads(vibe_store("verify", tmp_path / "one", "--json").out)
    assert (verified["checked"], verified["ok"]) == ([None], False)


each_command = pytest.mark.parametrize("command", ["ls", "show", "verify"])


@pytest.mark.parametrize("scheme", ["", "file://"])
@each_command
def test_a_directory_that_does_not_exist_is_an_error(
    vibe_store: Run, tmp_path: Path, command: str, scheme: str
) -> None:
    place = f"{scheme}{tmp_path}/nowhere"
    ran = vibe_store(command, place)
    assert (ran.status, ran.out, ran.err) == (1, "", f"error: There is no directory {place}.\n")


@pytest.mark.parametrize("scheme", ["", "file://"])
@each_command
def test_a_file_is_no_directory(vibe_store: Run, run_path: Path, command: str, scheme: str) -> None:
    place = f"{scheme}{run_path}/checkpoints/step_10/state.eqx"
    ran = vibe_store(command, place)
    said = f"error: {place} is a file; give a directory of checkpoints.\n"
    assert (ran.status, ran.out, ran.err) == (1, "", said)


AS_NOBODY = """
import io, os, sys
from contextlib import redirect_stderr, redirect_stdout
from vibe_store.cli import main

command, closed, sound = sys.argv[1:]
if os.geteuid() == 0:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main([command, sound])  # what is imported on the way may be out of the reach of nobody
    os.setgid(65534), os.setuid(65534)
sys.exit(main([command, closed]))
"""


@each_command
def test_a_directory_that_may_not_be_read_is_an_error(
    fast_folder: Callable[[], AbstractContextManager[Path]], run_path: Path, command: str
) -> None:
    with fast_folder() as folder:
        (folder / "closed").mkdir(mode=0)
        program = [sys.executable, "-c", AS_NOBODY, command, folder / "closed", run_path]
        ran = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    (said,) = ran.stderr.splitlines()
    assert said.startswith(f"error: Permission denied: {folder}")


def test_show_shows_the_newest_step_leaf_by_leaf(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("show", run_path)
    assert (ran.status, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["step", "20"] in lines
    assert ["metrics", "eval_return=nan"] in lines
    assert ["metadata", '{"env":', '"CartPole-v1"}'] in lines
    assert ["['w']", "numpy", "float32", "(3,", "2)"] in lines
    assert ["['k[0]']", "numpy_scalar", "int8", "()"] in lines
    assert ["['name']", "str", "[bold]text"] in lines


def test_show_as_json_has_the_documented_keys(vibe_store: Run, run_path: Path) -> None:
    shown = json.loads(vibe_store("show", run_path, "10", "--json").out)
    assert set(shown) == {
        "directory", "step", "created", "format", "size", "versions", "metrics", "metadata", "items",
    }  # fmt: skip
    assert shown["step"] == 10
    assert shown["metadata"] == {"env": "CartPole-v1"}
    assert shown["metrics"] == {"eval_return": 12.5}
    state = shown["items"]["state"]
    (file,) = state["files"]
    stored = run_path / "checkpoints" / "step_10" / file["key"]
    assert (file["name"], file["size"], len(file["checksum"])) == ("state.eqx", stored.stat().st_size, 32)
    assert {
        "path": "['w']",
        "kind": "numpy",
        "dtype": "float32",
        "shape": [3, 2],
        "impl": None,
        "value": None,
    } in (state["leaves"])


def test_show_of_a_step_that_is_not_there_names_those_that_are(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("show", run_path, "7")
    assert ran.status == 1
    assert ran.err.endswith(
        f"no committed checkpoint of step 7 in {run_path}/checkpoints; committed are: 10, 20.\n"
    )


@pytest.mark.parametrize("command", ["show", "verify"])
def test_where_nothing_is_committed_there_is_nothing_to_look_at(
    vibe_store: Run, tmp_path: Path, command: str
) -> None:
    ran = vibe_store(command, tmp_path)
    said = f"error: There is no committed checkpoint in {tmp_path}.\n"
    assert (ran.status, ran.out, ran.err) == (1, "", said)


def test_verify_of_a_step_that_is_not_there_is_an_error(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("verify", run_path, "7")
    said = f"error: There is no checkpoint of step 7 in {run_path}/checkpoints.\n"
    assert (ran.status, ran.out, ran.err) == (1, "", said)


def test_verify_of_sound_checkpoints_ends_with_0(vibe_store: Run, run_path: Path) -> None:
    ran = vibe_store("verify", run_path)
    assert ran.status == 0
    assert ran.out == f"2 checkpoints in {run_path}/checkpoints: all as they were saved.\n"


def test_verify_names_each_fault_and_ends_with_1(vibe_store: Run, run_path: Path) -> None:
    checkpoints = run_path / "checkpoints"
    flip_a_bit(checkpoints / "step_10" / "state.eqx")
    (checkpoints / "step_10" / "runner.eqx").unlink()
    ran = vibe_store("verify", run_path)
    assert (ran.status, ran.err) == (1, "")
    first, second, last = ran.out.splitlines()
    assert first.startswith("step 10: ")
    assert "step_10/state.eqx is damaged" in first
    assert "step_10/runner.eqx is missing" in second
    assert last == f"1 of 2 checkpoints in {checkpoints} is damaged."
    assert vibe_store("verify", run_path, "20").status == 0
    assert vibe_store("verify", checkpoints / "step_20").status == 0
    assert vibe_store("verify", checkpoints / "step_10").status == 1


def test_verify_looks_as_closely_as_it_is_told(vibe_store: Run, run_path: Path) -> None:
    flip_a_bit(run_path / "checkpoints" / "step_10" / "state.eqx")
    assert vibe_store("verify", run_path).status == 1
    ran = vibe_store("verify", run_path, "--level", "sizes")
    assert (ran.status, ran.out) == (
        0,
        f"2 checkpoints in {run_path / 'checkpoints'}: every file has its size.\n",
    )


def test_verify_as_json_has_the_documented_keys(vibe_store: Run, run_path: Path) -> None:
    flip_a_bit(run_path / "checkpoints" / "step_20" / "manifest.json")
    ran = vibe_store("verify", run_path, "--json")
    verified = json.loads(ran.out)
    assert ran.status == 1
    assert (verified["checked"], verified["ok"]) == ([10, 20], False)
    (fault,) = verified["faults"]
    assert (fault["step"], fault["file"]) == (20, "step_20/manifest.json")
    assert set(fault) == {"step", "file", "problem"}


@pytest.mark.parametrize("step", ["newest", "3.5", "-1", "9" * 5000])
@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_step_is_a_mistake_in_the_arguments(
    vibe_store: Run, run_path: Path, command: str, step: str
) -> None:
    ran = vibe_store(command, run_path, step)
    said = f"error: a step is a whole number, 0 or more; {step!r} is none.\n"
    assert (ran.status, ran.out, ran.err) == (2, "", said)


def test_plugins_lists_what_is_built_in(vibe_store: Run) -> None:
    ran = vibe_store("plugins", "--json")
    assert ran.status == 0
    assert {"storage", "serializer", "retention"} == {entry["kind"] for entry in json.loads(ran.out)}
    assert any(line.split()[:2] == ["serializer", "eqx"] for line in vibe_store("plugins").out.splitlines())


def test_plugins_with_a_name_shows_its_options_and_its_help(vibe_store: Run) -> None:
    ran = vibe_store("plugins", "best_n")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("retention policy best_n, of the plugin 'builtins' of vibe-store")
    assert "  Return the policy that keeps the ``n`` best checkpoints" in ran.out
    assert "    mode: Literal['min', 'max']\n" in ran.out
    assert "    compress: bool = False\n" in vibe_store("plugins", "orbax").out
    assert "It takes no options." in vibe_store("plugins", "eqx").out


def test_plugins_with_a_name_as_json_has_the_documented_keys(vibe_store: Run) -> None:
    (row,) = json.loads(vibe_store("plugins", "latest", "--json").out)
    assert row["options"] == [{"name": "max_to_keep", "type": "int", "required": False, "default": 5}]
    assert row["help"].startswith("Return the policy that keeps the ``max_to_keep`` highest steps.")
    listed = json.loads(vibe_store("plugins", "--json").out)
    assert {**row, "options": 0, "help": 0} in [{**each, "options": 0, "help": 0} for each in listed]


def test_plugins_with_a_name_that_nothing_has_is_answered_with_those_that_exist(vibe_store: Run) -> None:
    ran = vibe_store("plugins", "orbx")
    assert (ran.status, ran.out) == (1, "")
    assert "Nothing is called 'orbx'. Did you mean 'orbax'?" in ran.err


def test_show_says_which_distribution_a_serializer_is_from(vibe_store: Run, run_path: Path) -> None:
    assert "item state, written by the serializer eqx of vibe-store" in vibe_store("show", run_path).out
    item = json.loads(vibe_store("show", run_path, "--json").out)["items"]["state"]
    assert item["distribution"]["name"] == "vibe-store"
