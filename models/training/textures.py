"""The textures that a method pastes into normal images, and what its table says of them."""

from datasets.drawing.textures import TextureError, Textures, find_textures
from models.errors import ModelError


def textures_of(folder: str | None) -> Textures:
    """Return the images below a folder, or the suite's own set without one.

    Raises:
        ModelError: there is no such folder, or no image in it.
    """
    try:
        return find_textures(folder)
    except TextureError as error:
        raise ModelError(
            f"there are no textures to paste: {error}", {"anomaly_source": "name another with"}
        ) from error


def texture_remark(textures: Textures) -> str:
    """Say which textures a fit pastes."""
    return (
        f"Textures pasted in training: {textures.words}; --method.anomaly-source names a folder of "
        "others (papers: DTD)."
    )
