"""SimpleNet as its released code has it, where that differs from the paper."""

from dataclasses import replace

from models.methods.simplenet.simplenet import METHOD as SIMPLENET
from models.methods.simplenet.simplenet import SimpleNetOptions

METHOD = replace(
    SIMPLENET,
    # The adaptor's AdamW has PyTorch's default weight decay.
    options=SimpleNetOptions(
        adaptor_bias=True,
        adaptor_optimizer="adamw",
        adaptor_weight_decay=1e-2,
        hidden=1024,
        last_bias=False,
        init="xavier",
        batch_size=8,
        report_every=4,
    ),
    experiment={
        "structured": {
            "layers": (2, 3),
            "image_size": 329,
            "crop_size": 288,  # 36 x 36 grid
            "resize": "bilinear_shorter",  # torchvision's Resize
        }
    },
)
