"""Which code made a cell: a hash over files, which a copied tree without a commit has too, and its commit."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import PurePosixPath

from benchmarks.harness import ROOT

PACKAGE = "maskmatch_scale"
MEASURING = ("cell", "measure", "watch")
"""Modules of this package that run within a cell and decide its figures, beside the recipe."""
DIGITS = 16
"""Of sha256, that are kept."""
MOST_COMMITS = 200
"""Of those that changed the package, among which one is looked for; each takes some 20 ms."""


def hash_of(contents: Mapping[str, bytes]) -> str:
    """First digits of the sha256 over names and contents of files, in the order of their paths."""
    digest = hashlib.sha256()
    for name in sorted(contents, key=PurePosixPath):
        digest.update(f"{name}\0".encode() + contents[name] + b"\0")
    return digest.hexdigest()[:DIGITS]


def sources_hash() -> str:
    """Of all Python files of the package, as they are now."""
    package = ROOT / PACKAGE
    return hash_of({path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py")})


def measuring_hash() -> str:
    """Of `MEASURING`, as they are now."""
    folder = ROOT / "benchmarks" / "ablation"
    return hash_of({name: (folder / f"{name}.py").read_bytes() for name in MEASURING})


def commit_of(sources: str) -> str | None:
    """Short hash of the newest commit of this checkout whose package has these sources; None: it has none."""
    try:
        commits = _git("log", f"-n{MOST_COMMITS}", "--format=%h", "--", PACKAGE).decode().split()
        return next((commit for commit in commits if _hash_at(commit) == sources), None)
    except (OSError, subprocess.CalledProcessError):
        return None  # no checkout, or no git


def _hash_at(commit: str) -> str:
    """What `sources_hash` is at a commit."""
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, PACKAGE))) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".py"):
                file = archive.extractfile(member)
                assert file is not None
                contents[member.name.removeprefix(f"{PACKAGE}/")] = file.read()
    return hash_of(contents)


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
