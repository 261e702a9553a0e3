"""SimpleNet with adapted features on a sphere of fixed norm: ours."""

from dataclasses import replace

from models.methods.simplenet.simplenet import METHOD as SIMPLENET
from models.methods.simplenet.simplenet import SimpleNetOptions

METHOD = replace(SIMPLENET, options=SimpleNetOptions(norm=1.0), published_as="")
