"""What anomalib's models need that their constructors do not tell.

Epochs and batch sizes are those of anomalib's example configurations (configs/model,
examples/configs/model and src/anomalib/models/*/config.yaml, in the versions that had them) or,
where marked, of the model's README or of a constant in its code. The early stopping that goes with
some of them is left out: it watches metrics of the test set.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Needs of one model.

    Attributes:
        epochs: passes over the training images; None where its trainer arguments say it, or nobody.
        max_steps: optimizer steps after which it stops in any case; -1 for no such bound.
        batch_size: images per step; 32 is what anomalib's data modules have.
        multiple: the side of its images must be a multiple of this.
        fetches: what it downloads at first use, and what may be given in place of that.
    """

    epochs: int | None = None
    max_steps: int = -1
    batch_size: int = 32
    multiple: int = 1
    fetches: str = ""


DINO = "the weights of its DINO encoder, from timm's hub"
FACTS: dict[str, Facts] = {
    "anomaly_dino": Facts(fetches=DINO),
    "anomalyvfm": Facts(fetches="its weights MaticFuc/anomalyvfm_radio, from the Hugging Face hub"),
    "cfa": Facts(30, fetches="torchvision's weights of its backbone"),
    "cflow": Facts(50, batch_size=16),
    "csflow": Facts(240, batch_size=16, multiple=128, fetches="torchvision's EfficientNet-B5"),
    "dinomaly": Facts(max_steps=5000, batch_size=16, fetches=DINO),  # code, README
    "draem": Facts(
        700,
        batch_size=8,
        multiple=32,
        fetches="the texture images DTD (600 MB; --method.model-options dtd_dir=FOLDER names a "
        "folder of any other images)",
    ),
    "dsr": Facts(
        700, batch_size=8, multiple=32, fetches="its quantised encoder, from anomalib's releases"
    ),
    "efficient_ad": Facts(
        1000,
        70000,
        batch_size=1,
        fetches="its teacher, from anomalib's releases, and the images of Imagenette (1.5 GB; "
        "--method.model-options imagenet_dir=FOLDER names others, in a folder per class)",
    ),
    "fastflow": Facts(500, multiple=16),
    "foundad": Facts(2000, fetches=DINO),  # README
    "fre": Facts(6),
    "ganomaly": Facts(100),
    "general_ad": Facts(160),  # code
    "glass": Facts(100, batch_size=8),  # README
    "inp_former": Facts(200, fetches=DINO),  # code
    "l2bt": Facts(50, fetches=DINO),  # README
    "patchflow": Facts(200),
    "reverse_distillation": Facts(200, batch_size=16, multiple=32),  # batch size: README
    "stfpm": Facts(100),
    "super_add": Facts(fetches=DINO),
    "supersimplenet": Facts(300),  # README
    "uflow": Facts(200, fetches="the weights of its backbone, from timm's hub"),
    "uninet": Facts(multiple=32, fetches="torchvision's weights of its backbones"),
    "winclip": Facts(fetches="CLIP ViT-B-16-plus-240 of LAION-400M, by open_clip"),
}

REFUSED = {
    "cfm": "it needs a point cloud beside each image",
    "vlm_ad": "it asks a language model for a yes or no and has no score",
}
"""Models that no set of images and no ranking metric can do justice to."""
