"""The exception for mistakes of the user, printed without a traceback."""


class UserError(ValueError):
    """A mistake of the user. The message names the file, row or flag and says how to fix it."""
