"""The errors that are the user's to mend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the input. Says what is wrong, with which value, what was expected and what to do; ends with exit code 2."""


@contextmanager
def out_of_memory(told: Callable[[str], str]) -> Iterator[None]:
    """What the device has no room for is the user's to mend: told(what XLA says first) is the message."""
    try:
        yield
    except RuntimeError as error:  # jax's, which is not imported here
        if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(told(str(error).splitlines()[0])) from error


def first_line(error: BaseException) -> str:
    """What an error of a library's says, in at most 200 characters ("" where it says nothing)."""
    return next(iter(str(error).splitlines()), "")[:200]
