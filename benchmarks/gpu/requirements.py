"""What the machine must have, looked up without importing any of it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

OLDEST = {"torch": (2, 11), "triton": (3, 6)}


class Unusable(Exception):
    """The machine cannot run this; the message says why, in one line."""


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 11) of "2.11.0+cu130"."""
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0])[:2]))


def versions() -> dict[str, str | None]:
    """The installed version of each required package, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in OLDEST:
        try:
            found[name] = installed_version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def check_versions(found: dict[str, str | None]) -> None:
    """Hold the versions against the oldest that work.

    Raises:
        Unusable: if one is too old or missing.
    """
    for name, oldest in OLDEST.items():
        wanted = f"{name} must be {'.'.join(map(str, oldest))} or newer"
        version = found.get(name)
        if version is None:
            raise Unusable(f"{wanted}, and it is not installed")
        if numbers(version) < oldest:
            raise Unusable(f"{wanted}, got {version}")
