"""Plugins as users have them: wheels, installed into an environment of its own, and processes of that."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.proof, pytest.mark.xdist_group("installed plugins")]

ROOT = Path(__file__).parents[1]
OURS = ("vibe-store-gfs", "vibe-store-safetensors", "vibe-store-template")
ALL_OURS = (*OURS, "vibe-store-obstore")  # whose library is not in every environment

TINY = (
    *("--dqn.hidden-sizes", "4", "--dqn.buffer-size", "64", "--dqn.batch-size", "8"),
    *("--dqn.learning-starts", "16", "--runner.num-envs", "4", "--runner.eval-interval", "None"),
    *("--runner.checkpoint-interval", "16", "--runner.log-interval", "16", "--runner.total-timesteps", "64"),
)

HOOK = """
from vibe_store.hookspecs import Provider, hookimpl

@hookimpl
def vibe_store_retention():
    return [PROVIDER]
"""
TWICE = HOOK.replace("PROVIDER", "Provider('twice', 'vibe_store.retention:latest')")
MADE_UP = {
    "first": TWICE,
    "second": TWICE,
    "raising": "raise RuntimeError('no licence')",
    "newer": HOOK.replace("PROVIDER", "Provider('newer', 'vibe_store_newer:nothing', api=2)"),
    "slow": HOOK.replace("PROVIDER", "Provider('slow', 'vibe_store_slow.target:policy')"),
}
"""Distributions ``vibe-store-NAME`` 1.0, and what the module that their entry point names holds."""

SLOW_TARGET = """
import os, pathlib, time
pathlib.Path(os.environ["IMPORTED"]).touch()
time.sleep(float(os.environ.get("SECONDS", "10")))

def policy(days: int = 1):
    "Take its time."
"""

BUILD = """
import os, sys
from hatchling.build import build_wheel
for root in sys.argv[2:]:
    os.chdir(root)
    print(build_wheel(sys.argv[1]))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the dependencies of the one that runs the tests, and with chosen wheels."""

    path: Path
    variables: Mapping[str, str]

    def __call__(self, *arguments: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the command ``vibe-store`` that is installed there."""
        return subprocess.run(
            [self.path / "bin" / "vibe-store", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=self.path,
            env={**self.variables, **{name: str(value) for name, value in variables.items()}},
        )

    def pip(self, *arguments: str | Path) -> None:
        """Install or uninstall something there."""
        python = self.path / "bin" / "python"
        uv = _uv()
        if uv is not None:
            command = [uv, "pip", *arguments, "--python", python]
        else:
            command = [python, "-m", "pip", *arguments]
            command += ["--yes"] if arguments[0] == "uninstall" else []
        subprocess.run(command, check=True, capture_output=True, timeout=300, env={**self.variables})


def _uv() -> str | None:
    """Return where uv is, which takes a tenth of the time that pip takes."""
    return shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of vibe-store, of its plugins and of made-up ones, by distribution."""
    if not (ROOT / "plugins" / OURS[0]).exists():
        pytest.skip("the plugins are not beside these tests, as in a source distribution")
    pytest.importorskip("hatchling", reason="needs pip install hatchling")
    pytest.importorskip("tyro", reason='needs pip install "vibe-store[cli,rl]"')
    pytest.importorskip("gymnax", reason='needs pip install "vibe-store[cli,rl]"')
    sources = {name: ROOT / "plugins" / name for name in ALL_OURS} | {"vibe-store": ROOT}
    for name, code in MADE_UP.items():
        sources[f"vibe-store-{name}"] = _project(tmp_path_factory.mktemp(name), name, code)
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-c", BUILD, folder, *sources.values()]
    built = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return {name: folder / wheel for name, wheel in zip(sources, built.stdout.split(), strict=True)}


def _project(root: Path, name: str, code: str) -> Path:
    package = root / f"vibe_store_{name}"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    (package / "target.py").write_text(SLOW_TARGET)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "vibe-store-{name}"\nversion = "1.0"\ndependencies = ["vibe-store"]\n'
        f'[project.entry-points.vibe_store]\n{name} = "vibe_store_{name}"\n'
    )
    return root


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Callable[..., Environment]:
    """``make(*names)`` makes an environment with vibe-store and these plugins."""
    dependencies = tmp_path_factory.mktemp("dependencies")
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            # Neither the vibe-store that runs the tests nor a plugin of its own, nor what leads to one.
            if not entry.name.startswith("vibe_store") and entry.suffix != ".pth":
                (dependencies / entry.name).symlink_to(entry)
    cache = tmp_path_factory.mktemp("compiled")
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIBE_STORE_", "VIRTUAL_ENV"))
    }
    variables |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def environment(*names: str) -> Environment:
        path = tmp_path_factory.mktemp("environment")
        venv.create(path, symlinks=True, with_pip=_uv() is None)
        (site,) = path.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(f"{dependencies}\n")
        made = Environment(path, variables)
        made.pip("install", "--no-index", "--no-deps", *(wheels[name] for name in ("vibe-store", *names)))
        return made

    return environment


@pytest.fixture(scope="module")
def ours(make: Callable[..., Environment]) -> Environment:
    """An environment with the plugins of this repository."""
    return make(*OURS)


@pytest.fixture(scope="module")
def made_up(make: Callable[..., Environment]) -> Environment:
    """An environment with every kind of plugin that is at odds with something."""
    return make(*(f"vibe-store-{name}" for name in MADE_UP))


def rows_of(vibe_store: Environment, *arguments: str, **variables: str | Path) -> list[dict[str, object]]:
    """What ``vibe-store plugins --json`` says of what is not vibe-store's own."""
    done = vibe_store("plugins", *arguments, "--json", **variables)
    rows = json.loads(done.stdout)
    return [row for row in rows if row["distribution"] != "vibe-store"]


# Plugins that do what they should.


@pytest.mark.parametrize("name", ALL_OURS)
def test_a_wheel_holds_its_typed_package_and_the_licence_and_nothing_else(
    wheels: dict[str, Path], name: str
) -> None:
    package = name.replace("-", "_")
    with zipfile.ZipFile(wheels[name]) as wheel:
        names = wheel.namelist()
    assert {part.partition("/")[0] for part in names} == {package, f"{package}-0.1.0.dist-info"}
    assert {f"{package}/py.typed", f"{package}-0.1.0.dist-info/licenses/LICENSE"} <= set(names)


def test_what_is_installed_is_listed(ours: Environment) -> None:
    provided = {
        (row["kind"], row["name"], row["distribution"], row["version"], row["status"])
        for row in rows_of(ours)
    }
    assert provided == {
        ("retention", "gfs", "vibe-store-gfs", "0.1.0", "ok"),
        ("serializer", "safetensors", "vibe-store-safetensors", "0.1.0", "ok"),
        ("storage", "sqlite", "vibe-store-template", "0.1.0", "ok"),
        ("serializer", "raw", "vibe-store-template", "0.1.0", "ok"),
        ("retention", "records", "vibe-store-template", "0.1.0", "ok"),
    }
    lines = ours("plugins").stdout.splitlines()
    assert ["retention", "gfs", "vibe-store-gfs", "0.1.0", "gfs", "ok"] in [line.split() for line in lines]


def test_one_of_them_shows_what_it_takes(ours: Environment) -> None:
    (row,) = rows_of(ours, "gfs")
    assert [option["name"] for option in row["options"]] == [
        "hourly", "daily", "weekly", "monthly", "yearly",
    ]  # fmt: skip
    assert str(row["help"]).startswith("Keeps the newest checkpoint of each of the last hours")
    assert "    hourly: int = 24\n" in ours("plugins", "gfs").stdout


@pytest.fixture(scope="module")
def run(ours: Environment) -> Path:
    """A run on CartPole that was trained with two of the plugins, and then resumed."""
    names = ("--runner.serializer", "safetensors", "--runner.retention", "gfs:hourly=2")
    done = ours("train", "cartpole_dqn", *TINY, *names, "--run-id", "mine")
    assert done.returncode == 0, done.stderr
    done = ours(
        "train",
        "cartpole_dqn",
        "--run-id",
        "mine",
        "--runner.resume",
        "true",
        "--runner.total-timesteps",
        "96",
    )
    assert done.returncode == 0, done.stderr
    assert "Going on from step 64.\n" in done.stdout
    return ours.path / "runs" / "mine"


def test_a_run_is_trained_and_resumed_with_the_plugins_that_are_named(ours: Environment, run: Path) -> None:
    rows = json.loads(ours("ls", run, "--json").stdout)["checkpoints"]
    # Six were saved; hours end while tests run, but not two of them.
    assert 96 in [row["step"] for row in rows]
    assert len(rows) < 4
    assert {row["serializer"] for row in rows} == {"safetensors"}
    assert sorted(path.name for path in (run / "checkpoints" / "step_96").glob("*.safetensors")) == [
        "runner.safetensors", "state.safetensors",
    ]  # fmt: skip
    shown = ours("show", run).stdout
    assert "item state, written by the serializer safetensors of vibe-store-safetensors 0.1.0" in shown


def test_a_run_in_the_storage_of_a_plugin_is_trained_and_resumed(ours: Environment) -> None:
    place = f"sqlite://{ours.path}/cartpole.db"
    names = ("--runner.serializer", "raw", "--runner.retention", "records:mode=min")
    place_and_names = ("--runner.checkpoint-dir", place, *names)
    done = ours("train", "cartpole_dqn", *TINY, *place_and_names, "--run-id", "database")
    assert done.returncode == 0, done.stderr
    flags = ("--runner.resume", "true", "--runner.total-timesteps", "96")
    done = ours("train", "cartpole_dqn", "--run-id", "database", *flags)
    assert done.returncode == 0, done.stderr
    assert "Going on from step 64.\n" in done.stdout
    rows = json.loads(ours("ls", place, "--json").stdout)["checkpoints"]
    assert [(row["step"], row["serializer"]) for row in rows] == [(96, "raw")]


def test_a_wrong_option_is_answered_with_those_that_the_plugin_takes(ours: Environment, run: Path) -> None:
    done = ours("prune", run, "--retention", "gfs:hourli=1")
    assert done.returncode == 1
    assert done.stderr == (
        "error: The retention policy 'gfs' takes hourly, daily, weekly, monthly and yearly; 'hourli' is none "
        "of them. Did you mean 'hourly'?\n"
    )


def test_once_it_is_uninstalled_a_checkpoint_says_what_wrote_it_and_what_to_install(
    make: Callable[..., Environment], run: Path
) -> None:
    vibe_store = make("vibe-store-safetensors", "vibe-store-gfs")
    vibe_store.pip("uninstall", "vibe-store-safetensors")
    assert [row["name"] for row in rows_of(vibe_store)] == ["gfs"]
    assert vibe_store("verify", run).returncode == 0  # to know that it is whole takes no plugin
    flags = ("--base-dir", run.parent, "--run-id", run.name, "--runner.total-timesteps", "128")
    resume = ("train", "cartpole_dqn", *flags, "--runner.resume", "true")
    for what, serializer in (
        (f"checkpoint of step 96 in {run}/checkpoints", ()),
        (f"item 'state' of {run}/checkpoints/step_96", ("--runner.serializer", "eqx")),
    ):
        done = vibe_store(*resume, *serializer)
        assert done.returncode == 1
        assert (
            f"The {what} cannot be loaded: it was written by the serializer 'safetensors' of "
            "vibe-store-safetensors 0.1.0, which is not installed or does not provide it. "
            "Run `pip install vibe-store-safetensors`"
        ) in done.stderr


def test_once_they_are_uninstalled_a_run_says_where_its_storage_and_its_retention_were_from(
    make: Callable[..., Environment],
) -> None:
    vibe_store = make("vibe-store-template", "vibe-store-gfs")
    place, run = f"sqlite://{vibe_store.path}/run.db", vibe_store.path / "runs" / "elsewhere"
    flags = ("--runner.checkpoint-dir", place, "--runner.retention", "gfs:hourly=2")
    done = vibe_store("train", "cartpole_dqn", *TINY, *flags, "--run-id", run.name)
    assert done.returncode == 0, done.stderr
    resume = ("train", "cartpole_dqn", "--run-id", run.name, "--runner.resume", "true")
    vibe_store.pip("uninstall", "vibe-store-gfs")
    done = vibe_store(*resume)
    assert done.returncode == 1
    assert (
        "was trained with the retention policy 'gfs:hourly=2' of vibe-store-gfs 0.1.0, which is not "
        "installed or does not provide it. Run `pip install vibe-store-gfs`, if you trust who wrote "
    ) in done.stderr
    assert done.stderr.endswith(", or go on without it: --runner.retention None.\n")
    assert vibe_store(*resume, "--runner.retention", "None").returncode == 0
    vibe_store.pip("uninstall", "vibe-store-template")
    done = vibe_store(*resume, "--runner.retention", "None")
    assert done.returncode == 1
    assert f"was trained with the storage {place!r} of vibe-store-template 0.1.0, which is not" in done.stderr
    done = vibe_store("ls", run)
    assert done.returncode == 1
    assert (
        "It is in a storage of vibe-store-template 0.1.0 (`pip install vibe-store-template`)" in done.stderr
    )


# Plugins that are at odds with something.


def test_each_is_listed_with_what_is_wrong_and_takes_no_other_down(
    made_up: Environment, tmp_path: Path
) -> None:
    rows = {row["plugin"]: row for row in rows_of(made_up, IMPORTED=tmp_path / "imported")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "first": "conflict",
        "second": "conflict",
        "raising": "broken",
        "newer": "broken",
        "slow": "ok",
    }
    assert "Importing it raised RuntimeError: no licence" in rows["raising"]["reason"]
    assert "was written for version 2 of the plugin interface" in rows["newer"]["reason"]
    done = made_up("plugins", "latest")
    assert done.returncode == 0
    assert "warning: The plugin 'raising' of vibe-store-raising 1.0 is broken" in done.stderr


def test_the_list_does_not_wait_for_a_target_that_is_slow_to_import(
    made_up: Environment, tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    assert made_up("plugins", IMPORTED=imported).returncode == 0
    assert not imported.exists()
    done = made_up("plugins", "slow", IMPORTED=imported, SECONDS="0")
    assert imported.exists()
    assert "  Take its time.\n\n  options:\n    days: int = 1\n" in done.stdout


def test_a_name_that_two_claim_names_both_and_how_to_block_one(made_up: Environment, tmp_path: Path) -> None:
    done = made_up("prune", tmp_path, "--retention", "twice:max_to_keep=1")
    assert done.returncode == 1
    both = "the plugin 'first' of vibe-store-first 1.0 and the plugin 'second' of vibe-store-second 1.0"
    assert f"Several plugins claim this name: {both}. Uninstall one, or disable it" in done.stderr
    assert "putting first or second into the environment variable VIBE_STORE_DISABLE_PLUGINS" in done.stderr
    disabled = {"VIBE_STORE_DISABLE_PLUGINS": "vibe-store-first"}
    assert made_up("prune", tmp_path, "--retention", "twice:max_to_keep=1", **disabled).returncode == 0
    made_up.pip("uninstall", "vibe-store-first")
    assert made_up("prune", tmp_path, "--retention", "twice:max_to_keep=1").returncode == 0


def test_one_for_a_newer_interface_says_what_to_upgrade(made_up: Environment, tmp_path: Path) -> None:
    done = made_up("prune", tmp_path, "--retention", "newer")
    assert done.returncode == 1
    assert "The plugin 'newer' of vibe-store-newer 1.0 was written for version 2" in done.stderr
    assert "upgrade it with `pip install --upgrade vibe-store`" in done.stderr
