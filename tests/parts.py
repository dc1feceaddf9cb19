"""The files of tests in parts, to be run at the same time by processes of their own."""

from collections.abc import Iterable


def part(files: Iterable[str], which: str) -> set[str]:
    """Return the files of one part: `"1/2"` is the first of two.

    Raises:
        ValueError: There is no such part.
    """
    number, _, count = which.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"`--part` must be such as 1/2. Received: {which!r}.")
    return set(sorted(set(files))[int(number) - 1 :: int(count)])
