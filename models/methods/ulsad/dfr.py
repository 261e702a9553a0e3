"""Deep feature reconstruction: the local branch of ULSAD alone, with ULSAD's losses.

It is the baseline that ULSAD revisits, not the network of "DFR: Deep Feature Reconstruction for
Unsupervised Anomaly Segmentation" (Shi et al., 2021), which has 1 x 1 convolutions.
"""

from dataclasses import replace

from models.methods.ulsad.ulsad import METHOD as ULSAD
from models.methods.ulsad.ulsad import UlsadOptions

METHOD = replace(ULSAD, options=UlsadOptions(branches="local"), published_as="")
