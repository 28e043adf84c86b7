"""The one exception whose text is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake of the user's; the message names the file, row or flag and says the mend."""
