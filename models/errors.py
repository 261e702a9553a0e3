"""The error that a user of the models can mend."""


class ModelError(Exception):
    """A backbone, its weights or a head cannot be used; the message says why and the way out."""
