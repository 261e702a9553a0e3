"""The frozen backbone: images in, patch features of one grid out."""

import contextlib
import difflib
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.format import Format
from torch import Tensor, nn

from models.backbone.class_tokens import ClassTokens
from models.backbone.rewriting import accelerated, with_narrow_in_full
from models.backbone.weights import LoadedWeights, load_backbone, options_for_any_size
from models.detector import Extractor
from models.errors import ModelError, compiler_error
from models.features.matmul import fp32_settings

Pool = Literal["mean", "class_token"]
VERSION = 1
"""Raise it with any change of this package that changes features: stored ones are then left."""


class FrozenExtractor(Extractor):
    """Features of chosen stages of a timm backbone, averaged over patches, on the largest grid.

    As published for NoCo and SimpleNet: every stage's map gets a `patch_size` x `patch_size`
    average pooling (stride 1, padding zeros counted), is resized bilinearly to the largest map, and
    all are concatenated. With `pool` the stages' global averages are concatenated instead, a
    1 x 1 grid for semantic tasks. Always in eval mode and without gradient.

    Args:
        backbone: a timm model name.
        layers: stages as timm counts them (wide_resnet50_2: 0 is the stem, 1 to 4 are the stages).
        weights: "auto", "random", or a .safetensors or .pth file.
        patch_size: odd side of the averaged neighbourhood; 1 for none.
        feature_location: "bottleneck", or "expansion" for the wider maps before an EfficientNet's
            projections.
        pool: what stands for an image, on a 1 x 1 grid: the global average of a stage's map, or a
            transformer's class token; None for the maps.
        precision: "fp32", or "tf32", which differs by what `set_fp32` was told; or "bf16" or
            "fp16", the autocast of the backbone, in which convolutions over fewer than 16 channels
            stay in fp32 (`with_narrow_in_full`).
        compile_backbone: run it through torch.compile.
        rewrite: run what `accelerated` makes of it: the same maps up to rounding, in less time;
            without effect in half precision.

    Raises:
        ModelError: unknown backbone, a stage or a class token it lacks, or weights that cannot be
            had.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        layers: tuple[int, ...],
        *,
        weights: str = "auto",
        patch_size: int = 3,
        feature_location: str = "bottleneck",
        pool: Pool | None = None,
        precision: str = "fp32",
        compile_backbone: bool = False,
        rewrite: bool = True,
    ) -> None:
        super().__init__()
        _check_backbone(backbone, layers, feature_location)
        if patch_size < 1 or patch_size % 2 == 0:
            raise ModelError(f"patch size {patch_size} is not a positive odd number")
        loaded = _load(backbone, weights, tuple(sorted(layers)), feature_location)
        self.backbone = backbone
        self.weights = weights
        self.layers = tuple(sorted(layers))
        self.patch_size = patch_size
        self.feature_location = feature_location
        self.pool = pool
        self.precision = precision
        self.weights_source = loaded.source
        self._weights_digest = loaded.digest
        self._random_weights = loaded.random
        net = ClassTokens(loaded.net, backbone) if pool == "class_token" else loaded.net
        self.net = net.to(memory_format=torch.channels_last)
        self.compiled = compile_backbone
        # A folded kernel can leave float16's range, and loses more than its parts to bfloat16's
        # rounding (measured: features 9 % off, against 7 %).
        self.rewrite = rewrite and not self._halves
        # What runs, made of `net` for the first images. In a tuple: its weights are not to be
        # counted twice.
        self._run: tuple[Any, ...] = ()
        taps: Any = loaded.net.feature_info  # timm's declaration of the stages
        self.stage_channels: tuple[int, ...] = tuple(taps.channels())
        self.strides: tuple[int, ...] = tuple(taps.reduction())
        self.register_buffer("mean", _per_channel(backbone, "mean"), persistent=False)
        self.register_buffer("std", _per_channel(backbone, "std"), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def pooled(self) -> bool:
        """Whether features are of whole images, on a 1 x 1 grid."""
        return self.pool is not None

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return self.mean.device

    @property
    def weights_digest(self) -> str:
        """Short hash of the backbone's weights."""
        return self._weights_digest

    @property
    def random_weights(self) -> bool:
        """Whether the backbone's weights are random because that was asked for."""
        return self._random_weights

    @property
    def channels(self) -> int:
        """Channels of the concatenated features."""
        return sum(self.stage_channels)

    @property
    def _halves(self) -> bool:
        """Whether most of it computes in half precision."""
        return self.precision not in {"fp32", "tf32"}

    def train(self, mode: bool = True) -> "FrozenExtractor":
        """Stay in eval mode: batch statistics of a frozen network must not move."""
        del mode
        return super().train(False)

    def require_size(self, size: int) -> None:
        """Check that the backbone takes images of size x size pixels; most take any.

        Raises:
            ModelError: it does not; the nearest sizes that it takes are named.
        """
        config = timm.get_pretrained_cfg(self.backbone)
        if config is None or not config.fixed_input_size:
            return
        options: dict[str, Any] = {"features_only": True, "out_indices": self.layers}
        with torch.device("meta"):
            net = timm.create_model(self.backbone, **options, **options_for_any_size(self.backbone))

        def refusal(side: int) -> str:
            try:
                net(torch.empty(1, 3, side, side, device="meta"))
            except (AssertionError, RuntimeError, ValueError) as error:
                return " ".join(str(error).split())[:200] or type(error).__name__
            return ""

        if reason := refusal(size):
            below = next((s for s in range(size - 1, 0, -1) if not refusal(s)), None)
            own = config.input_size[-1]
            above = next((s for s in range(size + 1, 2 * size + own) if not refusal(s)), None)
            fitting = [str(side) for side in (below, above) if side is not None]
            raise ModelError(
                f"{self.backbone} takes no images of {size} pixels ({reason}); the nearest that it "
                f"takes are {' and '.join(fitting) or 'none'}: set --image-size or --crop-size"
            )

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, S, S) as the backbone takes them: float32, normalised."""
        # From pinned memory the copy overlaps with what the device is still at.
        pixels = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return (pixels.float() / 255 - self.mean) / self.std

    @torch.inference_mode()
    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Run the backbone once.

        Args:
            images: (B, 3, S, S), uint8.

        Returns:
            One (B, C_l, H_l, W_l) float32 map per stage at its own resolution, patch-averaged
            (or (B, C_l, 1, 1) when pooled). Feed them to `assemble`.
        """
        pixels = self.pixels(images)
        if not self._run:
            net = self.net
            if self.rewrite:
                net = accelerated(net, pixels[:1])
            elif self._halves:
                net = with_narrow_in_full(net)
            self._run = (torch.compile(net) if self.compiled else net,)
        with self._autocast(pixels.device.type):
            maps = self._forward(pixels)
        maps = [m.float() for m in channels_first(self.net, maps)]
        if self.pooled:
            return [m.mean(dim=(2, 3), keepdim=True) for m in maps]  # (B, C_l, 1, 1)
        return [F.avg_pool2d(m, self.patch_size, 1, self.patch_size // 2) for m in maps]

    def _forward(self, pixels: Tensor) -> list[Tensor]:
        (run,) = self._run
        try:
            return run(pixels)
        except Exception as error:
            if self.compiled and (failed := compiler_error(self.backbone, error)):
                raise failed from error
            raise

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, C, H, W), float32, of uint8 images (B, 3, S, S)."""
        return self.assemble(self.stage_maps(images))

    def fingerprint(self) -> dict[str, Any]:
        """Return everything the features depend on beside the images, as JSON values."""
        return {
            "backbone": self.backbone,
            "weights": self.weights_digest,
            "layers": list(self.layers),
            "patch_size": self.patch_size,
            "feature_location": self.feature_location,
            "pooled": self.pooled,
            "precision": self.precision,
            "compiled": self.compiled,
            "rewritten": self.rewrite,
            "device": self._device_name(),
            "fp32": fp32_settings() if self.device.type == "cuda" else [],
            "versions": [VERSION, torch.__version__, timm.__version__],
            # Only where it is asked for: what was stored before it could be, stays.
            **({"class_token": True} if self.pool == "class_token" else {}),
        }

    def _device_name(self) -> str:
        """Return what tells devices apart that may choose other algorithms."""
        if self.device.type != "cuda":
            return self.device.type
        return f"{self.device.type} {torch.cuda.get_device_name(self.device)}"

    def _autocast(self, device_type: str) -> contextlib.AbstractContextManager:
        if not self._halves:
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(device_type, dtype=dtype)


def channels_first(net: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Return the stages' maps of a timm feature network as (B, C_l, H_l, W_l)."""
    if getattr(net, "output_fmt", Format.NCHW) == Format.NHWC:
        return [rearrange(m, "b h w c -> b c h w") for m in maps]
    return maps


def describe_stages(backbone: str) -> list[str]:
    """List the stages a backbone has, e.g. "1 (layer1, 256 channels, stride 4)"."""
    with torch.device("meta"):
        net = timm.create_model(backbone, pretrained=False, features_only=True)
    info: Any = net.feature_info
    return [
        f"{i} ({entry['module']}, {entry['num_chs']} channels, stride {entry['reduction']})"
        for i, entry in enumerate(info.info)
    ]


def _check_backbone(backbone: str, layers: tuple[int, ...], feature_location: str) -> None:
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone.split(".")[0], timm.list_models(), n=5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelError(f"timm has no backbone {backbone!r}{hint}")
    if feature_location not in {"bottleneck", "expansion"}:
        raise ModelError(f"feature location {feature_location!r} is not bottleneck or expansion")
    if feature_location == "expansion" and "efficientnet" not in backbone:
        raise ModelError(f"{backbone} has no expansion features; only EfficientNets have")
    if not layers or len(set(layers)) != len(layers):
        raise ModelError(f"layers {layers} must name at least one stage, each once")
    if min(layers) < 0:  # to timm, the last stages
        _check_stages(backbone, layers)


def _check_stages(backbone: str, layers: tuple[int, ...]) -> None:
    try:
        stages = describe_stages(backbone)
    except RuntimeError as error:  # a tag that timm does not know, or no maps to be had
        raise ModelError(f"backbone {backbone}: {error}") from error
    for layer in layers:
        if not 0 <= layer < len(stages):
            raise ModelError(f"{backbone} has no stage {layer}; it has {', '.join(stages)}")


def _load(
    backbone: str, weights: str, layers: tuple[int, ...], feature_location: str
) -> LoadedWeights:
    try:
        return load_backbone(backbone, weights, layers, feature_location)
    except ModelError:
        raise
    except Exception:
        # A stage that is not there, perhaps: timm has many errors for it, most without a word. To
        # look at the stages beforehand would build the network once more.
        _check_stages(backbone, layers)
        raise


def _per_channel(backbone: str, key: str) -> Tensor:
    values = getattr(timm.get_pretrained_cfg(backbone), key)
    return rearrange(torch.tensor(values), "c -> 1 c 1 1")
