"""The error that a user of the models can mend."""

from collections.abc import Mapping


class ModelError(Exception):
    """A backbone, its weights or a head cannot be used; the message says why.

    Args:
        message: what is wrong.
        change: options of the method by which it can be mended -> what to do with each ("lower",
            "none keeps all"); whoever shows the message says how they are typed.
    """

    def __init__(self, message: str, change: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.change = dict(change or {})


def compiler_error(what: str, error: Exception) -> ModelError | None:
    """Return what to say where torch.compile failed; None of any other error."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._ind")):
        return None
    reason = str(error).strip().splitlines()[0]
    return ModelError(
        f"--compile: {what} could not be compiled ({reason}); leave it out, or on a CPU install a "
        "C++ compiler"
    )
