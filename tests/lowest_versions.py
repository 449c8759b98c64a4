"""Says of each requirement of pyproject.toml whether its lowest version is the one installed here."""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def floors() -> Iterator[tuple[str, Version]]:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in {*project["dependencies"], *(line for lines in extras for line in lines)}:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            (floor,) = (each.version for each in requirement.specifier if each.operator == ">=")
            yield requirement.name, Version(floor)


def main() -> int:
    above = [
        f"{name} is {version(name)} here, and pyproject.toml allows {floor}"
        for name, floor in sorted(floors())
        if Version(version(name)) != floor
    ]
    print("\n".join(above) or "Every requirement is installed in its lowest version.")
    return bool(above)


if __name__ == "__main__":
    sys.exit(main())
