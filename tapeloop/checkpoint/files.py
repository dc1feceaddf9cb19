"""Folders that are there wholly or not at all, and say whether they are as they were written.

Each is written aside, synced and renamed. Its file `SHA256SUMS` holds the digests of its other files, as
`sha256sum -c SHA256SUMS` checks them, and its own digest in the last line.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence

SUMS = "SHA256SUMS"
TENSORS = "tensors"  # the prefix of the files that TensorFlow writes
ASIDE = ".writing-"  # what the names of folders begin with that are not complete, or are about to go
_CHUNK_BYTES = 2**22


class DamagedError(Exception):
    """A folder is not as it was written."""


@contextlib.contextmanager
def written_aside(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a folder to write in, which becomes `final` at the end of this context, or goes if anything fails.

    Args:
        final: Where the folder shall be. What is there already is replaced.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.parent / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        aside.mkdir()
        yield aside
        _seal(aside)
        # A folder cannot be renamed onto another in one go. In between, the one before stands under a name of its own.
        before = replaced(final)
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.rename(final, before)
        os.rename(aside, final)
        _sync(final.parent)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replaced(final: pathlib.Path) -> pathlib.Path:
    """Return where the folder of a name stands while it is replaced."""
    return final.with_name(f"{final.name}.replaced")


def present(place: pathlib.Path) -> pathlib.Path:
    """Return where a folder is: at its place, or beside it if the process was killed while another took its place."""
    return replaced(place) if not place.is_dir() and replaced(place).is_dir() else place


def verify(folder: pathlib.Path, only: Collection[str] | None = None) -> None:
    """Check that a folder is as it was written.

    Args:
        folder: The folder.
        only: The names of the files whose content is read; by default, of all. The others must be there.

    Raises:
        DamagedError: A file is missing, was added, or has other content.
    """
    found = _sums(folder)
    there = {path.name for path in folder.iterdir()} - {SUMS}
    if there != set(found):
        missing, added = sorted(set(found) - there), sorted(there - set(found))
        raise DamagedError(f"files are missing or do not belong there: {', '.join([*missing, *added])}")
    names = [name for name in found if only is None or name in only]
    for name, digest in zip(names, _digests([folder / name for name in names])):
        if digest != found[name]:
            raise DamagedError(f"{name} is not as it was written")


def digest_of(folder: pathlib.Path) -> str:
    """Return the digest of the digests of a folder: that of all that it holds."""
    return hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()


def remove(folder: pathlib.Path) -> None:
    """Remove a folder, so that nobody finds half of it."""
    aside = folder.parent / f"{ASIDE}{uuid.uuid4().hex}"
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(parent: pathlib.Path) -> None:
    """Remove what processes that were killed have left behind."""
    for left in parent.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _sums(folder: pathlib.Path) -> dict[str, str]:
    """Return the digest of each file of a folder, as they were when it was written.

    Raises:
        DamagedError: The list of digests is missing or damaged.
    """
    try:
        content = (folder / SUMS).read_bytes()
    except OSError as error:
        raise DamagedError(f"{SUMS} cannot be read ({error.strerror})") from None
    body, own = content[:-65], content[-65:]
    if own != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise DamagedError(f"{SUMS} is not as it was written")
    return {name: digest for digest, name in re.findall(r"^(\w{64})  (.+)$", body.decode(), re.MULTILINE)}


def _seal(folder: pathlib.Path) -> None:
    """Write the digests of a folder's files, and have all of it reach the disk."""
    paths = sorted(folder.iterdir())
    body = "".join(f"{digest}  {path.name}\n" for path, digest in zip(paths, _digests(paths))).encode()
    # The last line is a comment to `sha256sum`, and ends the list: a list that was cut off has none.
    body += b"# digest of the lines above: "
    (folder / SUMS).write_bytes(body + hashlib.sha256(body).hexdigest().encode() + b"\n")
    for path in (*paths, folder / SUMS, folder):
        _sync(path)


def _digests(paths: Sequence[pathlib.Path]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the lock of the interpreter
        return list(pool.map(_digest, paths))


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: pathlib.Path) -> None:
    """Have a file or the entries of a folder reach the disk."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
