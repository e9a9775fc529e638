"""The errors that are the user's to mend."""


class UserError(Exception):
    """A mistake in the input. Says what is wrong, with which value, what was expected and what to do; ends with exit code 2."""
