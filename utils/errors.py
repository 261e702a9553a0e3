"""The errors whose message is meant for the user."""


class UsageError(Exception):
    """The command asks for something this machine or these files cannot give."""


class RunError(Exception):
    """The run folder cannot be used; the message names the file or option and the way out."""
