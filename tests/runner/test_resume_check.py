"""``verify_resume`` on trainers that resume and trainers that do not, in processes that are really killed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vibe_store.checkpoint import CheckpointManager, list_checkpoints
from vibe_store.errors import InvalidValueError, TrainerFailedError
from vibe_store.runner import ResumeReport, verify_resume
from vibe_store.runner.resume_check import differing_leaves

pytestmark = pytest.mark.proof

TRAINER = Path(__file__).with_name("counting_trainer.py")


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., ResumeReport]:
    def run(does: str, **settings: Any) -> ResumeReport:
        return verify_resume(
            lambda directory: [sys.executable, str(TRAINER), directory, does], tmp_path, **settings
        )

    return run


def test_a_trainer_that_resumes_ends_in_the_same_bits(check: Callable[..., Any], tmp_path: Path) -> None:
    said: list[str] = []
    report = check("resumes", kills=2, on_event=said.append)
    assert (report.step, report.leaves, report.differences) == (20, 3, ())
    assert len(report.kills) == 2
    assert -1 <= report.kills[0] <= report.kills[1] < 20
    assert [entry.step for entry in list_checkpoints(tmp_path / "killed")][-1] == 20
    assert said[0].startswith("Trained straight to step 20 in ")
    assert sum(sentence.startswith("Killed ") for sentence in said) == 2


def test_what_a_trainer_forgets_is_named(check: Callable[..., Any]) -> None:
    report = check("forgets", kills=1)
    assert report.differences == ("state['x']: 1 of 3 numbers differ",)
    assert report.kills[0] >= 1


def test_a_trainer_that_begins_anew_has_not_resumed(check: Callable[..., Any]) -> None:
    with pytest.raises(TrainerFailedError, match=r"did not go on from step .* but began anew"):
        check("begins anew", kills=1)


def test_a_trainer_that_fails_is_quoted(check: Callable[..., Any]) -> None:
    with pytest.raises(TrainerFailedError, match=r"ended with status 3\. Its last lines:\nthere is no bread"):
        check("fails")


def test_a_trainer_that_commits_nothing_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(TrainerFailedError, match="committed no checkpoint in"):
        verify_resume(lambda _: [sys.executable, "-c", ""], tmp_path)


def test_a_run_that_saves_only_its_end_has_nothing_to_resume_from(check: Callable[..., Any]) -> None:
    with pytest.raises(InvalidValueError, match=r"saved only its step 20.*Let it save more often"):
        check("saves once")


def test_a_folder_of_earlier_runs_is_refused(check: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    with pytest.raises(InvalidValueError, match=r"straight exists\. Give a folder in which nothing was"):
        check("resumes")


@pytest.mark.parametrize("kills", [0, 1.5, True])
def test_kills_are_a_whole_number_of_one_or_more(kills: Any, check: Callable[..., Any]) -> None:
    with pytest.raises(InvalidValueError, match=r"kills=.* must be a whole number, at least 1"):
        check("resumes", kills=kills)


def save(directory: Path, state: Any, rest: Any) -> Path:
    with CheckpointManager(directory) as manager:
        manager.save(1, state, items={"rest": rest})
    return directory


STATE = {"a": np.array([0.0, np.nan, -0.0]), "key": jax.random.key(1), "name": "x"}


def test_equal_checkpoints_have_no_differing_leaves(tmp_path: Path) -> None:
    one, other = (save(tmp_path / name, STATE, {"n": 1}) for name in ("one", "other"))
    assert differing_leaves(one, other, 1) == (4, [])


def test_every_kind_of_difference_is_told_by_item_and_path(tmp_path: Path) -> None:
    one = save(tmp_path / "one", {**STATE, "gone": 1.5, "wide": np.zeros(2)}, {"n": 1})
    changed = {
        "a": np.array([0.0, np.nan, 0.0]),
        "key": jax.random.key(2),
        "name": "y",
        "wide": np.zeros(2, np.float32),
        "new": 2,
    }
    other = save(tmp_path / "other", changed, {"n": 2})
    assert differing_leaves(one, other, 1) == (
        6,
        [
            "state['a']: 1 of 3 numbers differ",
            "state['gone']: is missing from the killed run",
            "state['key']: 1 of 2 numbers differ",
            "state['name']: 'x' became 'y'",
            "state['wide']: float64[2] became float32[2]",
            "rest['n']: 1 became 2",
            "state['new']: is in the killed run alone",
        ],
    )
