"""A network as a file that needs nothing of this repository: ONNX or TorchScript.

ONNX needs packages of requirements-export.txt, imported where they are used.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LARGEST = 2**31 - 2**24
"""Bytes of weights that fit into one ONNX file, whose format ends at 2 GiB."""
INPUT = "images"
"""Name of the input."""


@dataclass(frozen=True)
class Exported:
    """A network in its new format, not yet a file.

    Attributes:
        run: scores images (B, 3, S, S) as whoever loads the file will.
        write: writes the file, with a description inside (JSON values by name).
        versions: of what made it.
    """

    run: Callable[[Tensor], tuple[Tensor, ...]]
    write: Callable[[Path, Mapping[str, Any]], None]
    versions: dict[str, str]


def require_onnx() -> None:
    """Check that what ONNX needs is installed.

    Raises:
        ModelError: it is not.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt "
            "(--format torchscript needs neither)"
        )


def to_onnx(network: nn.Module, example: Tensor, outputs: Sequence[str], opset: int) -> Exported:
    """Turn a network into ONNX, check it, and load it into onnxruntime (CPU).

    Args:
        network: in eval mode, on the CPU; takes images, returns a tuple.
        example: images (B, 3, S, S), at least two: a graph made from one would be for one.
        outputs: names of what it returns.
        opset: version of the operator set.

    Raises:
        ModelError: packages are missing, the weights exceed what one ONNX file holds, or the
            network has what PyTorch cannot write.
    """
    require_onnx()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > LARGEST:
        raise ModelError(
            f"its weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2: use --format "
            "torchscript, or train a smaller head (padim: fewer dims, knn: fewer positions, "
            "patchcore: a smaller coreset)"
        )
    import onnx  # as onnxruntime: an option's package
    import onnxruntime

    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes=({0: batch},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelError(
            f"PyTorch cannot write this network as ONNX ({reason}): --format torchscript"
        ) from error
    assert program is not None
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(o) for o in session.run(None, {INPUT: images.numpy()}))

    def write(path: Path, description: Mapping[str, Any]) -> None:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in description.items()}
        onnx.helper.set_model_props(model, texts)
        path.write_bytes(model.SerializeToString())

    return Exported(run, write, _versions("torch", *ONNX_PACKAGES) | {"opset": str(opset)})


def to_torchscript(network: nn.Module, example: Tensor) -> Exported:
    """Trace a network and freeze it, so that its weights are constants.

    The description lies in the file as description.json, which `torch.jit.load` gives back by
    `_extra_files`.

    Args:
        network: in eval mode, on the CPU.
        example: images (B, 3, S, S), at least two.
    """
    with _quiet(), torch.no_grad():
        module = torch.jit.freeze(torch.jit.trace(network, (example,), check_trace=False))

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, ...]:
        return module(images)

    def write(path: Path, description: Mapping[str, Any]) -> None:
        with _quiet():
            torch.jit.save(module, path, {"description.json": json.dumps(description)})

    return Exported(run, write, _versions("torch"))


def differences(
    exported: Exported, images: Tensor, expected: Mapping[str, Tensor], batch_sizes: Sequence[int]
) -> dict[str, float]:
    """Return the largest absolute difference of each output over all batch sizes.

    Args:
        exported: what is checked.
        images: (N, 3, S, S) uint8.
        expected: (N, ...) by the name of the output, in the order of the outputs.
        batch_sizes: each scores all images.
    """
    largest = dict.fromkeys(expected, 0.0)
    for size in batch_sizes:
        parts = zip(*(exported.run(batch) for batch in images.split(size)), strict=True)
        for (name, wanted), part in zip(expected.items(), parts, strict=True):
            difference = (torch.cat(part) - wanted).abs().max()
            # A nan stays, whatever follows it.
            largest[name] = torch.maximum(difference, torch.tensor(largest[name])).item()
    return largest


def example_program(
    file: str,
    file_format: str,
    outputs: Sequence[str],
    *,
    image_size: int,
    crop_size: int | None,
    resize: str,
    bit_depth: int,
) -> str:
    """Return a program that prints the score of the image it is given, without this repository.

    Args:
        file: name of the exported one.
        file_format: "onnx" or "torchscript".
        outputs: what it returns.
        image_size: that images are resized to.
        crop_size: centre crop, or None.
        resize: "opencv_square", or Pillow's "lanczos_shorter" or "bilinear_shorter".
        bit_depth: of the bits of 16-bit files that are used, the highest eight are kept.
    """
    is_onnx, by_opencv = file_format == "onnx", resize == "opencv_square"
    size = image_size if crop_size is None else crop_size
    results = f"{', '.join(outputs)}{',' * (len(outputs) == 1)}"
    imports = ["import cv2"] * by_opencv + ["import numpy as np"]
    imports += ["import onnxruntime" if is_onnx else "import torch"]
    imports += ["from PIL import Image, ImageOps"]
    side = f"({image_size}, {image_size})"
    # As `datasets.reading.images.read_image` reads it.
    lines = [
        *("import sys", "", *imports, ""),
        "image = ImageOps.exif_transpose(Image.open(sys.argv[1]))",
        'if image.mode.startswith("I"):  # 16 bits: the highest eight of those in use',
        f"    image = Image.fromarray((np.asarray(image) >> {bit_depth - 8}).astype(np.uint8))",
        'image = image.convert("RGB")',
    ]
    if by_opencv:
        lines += [
            "image = np.array(image)",
            f"image = cv2.resize(image, {side}, interpolation=cv2.INTER_LINEAR)",
        ]
    else:
        if crop_size is not None:
            lines += [
                f"side = tuple({image_size} if n == min(image.size) else "
                f"int({image_size} * n / min(image.size)) for n in image.size)"
            ]
            side = "side"
        kind = "LANCZOS" if resize == "lanczos_shorter" else "BILINEAR"
        lines += [f"image = np.array(image.resize({side}, Image.Resampling.{kind}))"]
    if crop_size is not None:
        half = "({} - {}) // 2" if by_opencv else "round(({} - {}) / 2)"
        top, left = (half.format(f"image.shape[{axis}]", crop_size) for axis in (0, 1))
        lines += [
            f"top, left = {top}, {left}",
            f"image = image[top : top + {crop_size}, left : left + {crop_size}]",
        ]
    lines += [
        "batch = np.ascontiguousarray(image.transpose(2, 0, 1))[None]  "
        f"# (1, 3, {size}, {size}) uint8"
    ]
    if is_onnx:
        lines += [
            f"session = onnxruntime.InferenceSession({json.dumps(file)})",
            f'{results} = session.run(None, {{"{INPUT}": batch}})',
        ]
    else:
        lines += [
            f"network = torch.jit.load({json.dumps(file)})",
            f"{results} = network(torch.from_numpy(batch))",
        ]
    return "\n".join([*lines, "print(float(scores[0]))", ""])


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks on their own code, and that TorchScript is deprecated, away."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
