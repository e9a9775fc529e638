"""The errors that are the user's to mend."""


class UserError(Exception):
    """A mistake in the input. Says what is wrong, with which value, what was expected and what to do; ends with exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error of a library's says, in at most 200 characters ("" where it says nothing)."""
    return next(iter(str(error).splitlines()), "")[:200]
