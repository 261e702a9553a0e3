"""What a run costs on a GPU, at each precision.

    python -m benchmarks.gpu --dataset mvtec --data-root MVTEC --category bottle --output gpu.md
    python -m benchmarks.gpu --device cpu --methods noco_cf --precisions fp32 bf16  # a check: demo

Each method runs with its preset, on one category, in one process. "File to map" decodes the test
images, runs the backbone and the fitted head on them, and upsamples and blurs the maps. "Bare
backbone" is the network as timm builds it, at the same precision, on images that are on the device
already: what the card could do. The fit reads stored features, or images where the method takes
these; metrics are all of them. All is timed until the device has done it, after a pass that is not
timed; medians of `--repeats`, but for the fit, which runs once. Reading takes `--workers`
processes, and their start counts: a category of fewer than some hundred images says little.
Peak memory is what tensors took at most, from the features to the maps.
"""

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.images import loader_of
from datasets.reading.loading import BatchLoader
from datasets.samples import Task
from models.backbone.extractor import FrozenExtractor
from models.building import build_detector, shape_of
from models.detector import Detector
from models.method import find_method
from pipeline.experiments import SCRIPTS, AnyExperiment, read_tasks
from pipeline.features import Extraction, extractor_of
from utils.cli import exits_cleanly
from utils.device import pick_device, wait_for_device
from utils.evaluation.scoring import score_batch
from utils.runs.environment import environment_record

METHODS = ("noco_cf", "patchcore", "padim", "simplenet")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = (
    "| method | precision | file to map, images/s | bare backbone, images/s | share | fit, s "
    "| metrics, s | peak, MB |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@dataclass(frozen=True)
class Costs:
    """What one method cost at one precision.

    Attributes:
        to_map: images a second, from file to map.
        bare: images a second of the bare backbone; None where the method brings its own network.
        fit: seconds.
        metrics: seconds.
        peak: bytes on the device; None on a CPU.
    """

    to_map: float
    bare: float | None
    fit: float
    metrics: float
    peak: int | None

    def cells(self) -> list[str]:
        """Return them as a table has them."""
        bare = ["", ""]
        if self.bare is not None:
            bare = [f"{self.bare:.0f}", f"{self.to_map / self.bare:.0%}"]
        peak = "" if self.peak is None else f"{self.peak / 1e6:.0f}"
        return [f"{self.to_map:.0f}", *bare, f"{self.fit:.2f}", f"{self.metrics:.3f}", peak]


@exits_cleanly()
def main(argv: Sequence[str] | None = None) -> None:
    """Measure the methods and print a table, as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", help="demo without a data root, else folder")
    parser.add_argument("--data-root", type=Path, help="folder of the data set")
    parser.add_argument("--category", help="the first one without it")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--backbone", help="the preset's without it")
    parser.add_argument("--image-size", type=int, help="whole images of this side, not cropped")
    parser.add_argument("--epochs", type=int, help="of what trains; the preset's without it")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda", help="cpu to check that all of it runs")
    parser.add_argument("--output", type=Path, help="write the table there too")
    arguments = parser.parse_args(argv)
    device = pick_device(arguments.device)
    given = sys.argv[1:] if argv is None else list(argv)
    lines = [made_with(["python", "-m", "benchmarks.gpu", *given], device)]
    wanted = arguments.precisions
    if device.type == "cpu" and "tf32" in wanted:
        lines.append("tf32 is left out: without a GPU it is fp32.")
        wanted = [one for one in wanted if one != "tf32"]
    fixed = [method for method in arguments.methods if has_one_precision(method)]
    if fixed:
        lines.append(f"In fp32 alone, having no frozen backbone: {', '.join(fixed)}.")
    lines.append(HEADER)
    for method in arguments.methods:
        for precision in ["fp32"] if method in fixed else wanted:
            experiment = SCRIPTS["train_mvtec"].parse(words_of(arguments, method, precision))
            costs = measure(experiment, arguments.category, arguments.repeats)
            lines.append(f"| {' | '.join([method, precision, *costs.cells()])} |")
    table = "\n".join([f"{line}\n" if line[0] != "|" else line for line in lines])
    print(table)
    if arguments.output is not None:
        arguments.output.write_text(f"{table}\n", encoding="utf-8")


def has_one_precision(method: str) -> bool:
    """Whether `--precision` says nothing to a method: it trains the only network it has."""
    return "precision" in find_method(method).ignored


def words_of(arguments: argparse.Namespace, method: str, precision: str) -> list[str]:
    """Return the command line of a training script that does the same."""
    dataset = arguments.dataset or ("demo" if arguments.data_root is None else "folder")
    words = [dataset, method, "--device", arguments.device]
    if not has_one_precision(method):
        words += ["--precision", precision]
    words += ["--cache", "device", "--workers", str(arguments.workers)]
    if arguments.data_root is not None:
        words += ["--data-root", str(arguments.data_root)]
    if arguments.backbone is not None:
        words += ["--backbone", arguments.backbone]
    if arguments.image_size is not None:
        words += ["--image-size", str(arguments.image_size), "--crop-size", "none"]
    if arguments.epochs is not None and hasattr(find_method(method).options, "epochs"):
        words += ["--method.epochs", str(arguments.epochs)]
    return words


def made_with(command: Sequence[str], device: torch.device) -> str:
    """Return a line that says when, on what and how a table was made."""
    record = environment_record(command, str(device))
    words = [record["started"][:10], record["device_name"]]
    if device.type == "cuda":
        words += [f"driver {record['driver'] or 'unknown'}", f"CUDA {record['cuda']}"]
    words.append(f"PyTorch {record['versions']['torch']}")
    return f"{', '.join(words)}: `{record['command']}`"


def measure(experiment: AnyExperiment, category: str | None, repeats: int) -> Costs:
    """Fit and score one category (the first, where none is named) and return what it cost."""
    gc.collect()  # the head and the features before
    task = read_tasks(experiment, [category] if category else None)[0]
    extractor = extractor_of(experiment)
    device = extractor.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    extraction = Extraction(experiment, extractor)
    test = extraction.test_set_of(task)
    normals, _ = extraction.normals_of(task)
    head = build_detector(experiment.method_name, extractor, experiment.method).to(device)
    fit = seconds(lambda: head.fit(normals, generator=torch.Generator().manual_seed(0)))
    scores = test.score(head)
    metrics = middle(lambda: test.measure(scores), repeats)
    to_map = middle(lambda: from_files(task, extraction, head), repeats)
    bare = None
    backbone = shape_of(extractor).backbone
    if backbone is not None:
        images = first_images(task, extraction).to(device)
        passes = -(-len(task.test) // len(images))
        per_pass = middle(lambda: bare_passes(backbone, images, passes), repeats) / passes
        bare = len(images) / per_pass
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Costs(len(task.test) / to_map, bare, fit, metrics, peak)


def from_files(task: Task, extraction: Extraction, head: Detector) -> None:
    """Decode the test images and make their maps."""
    for batch in loader_for(task, extraction):
        with torch.inference_mode():
            score_batch(head, extraction.extractor.stage_maps(batch.images), extraction.scoring)


def bare_passes(backbone: FrozenExtractor, images: Tensor, count: int) -> None:
    """Run the backbone alone, as timm builds it, on images (B, 3, S, S) uint8 on its device."""
    half = HALVES.get(backbone.precision)
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if half is not None:
        autocast = torch.autocast(images.device.type, dtype=half)
    with torch.inference_mode(), autocast:
        for _ in range(count):
            backbone.net(backbone.pixels(images))


def first_images(task: Task, extraction: Extraction) -> Tensor:
    """Return the first batch of test images, (B, 3, S, S) uint8."""
    return next(iter(loader_for(task, extraction))).images


def loader_for(task: Task, extraction: Extraction) -> BatchLoader:
    """Return the batches of test images, read as a run reads them."""
    experiment = extraction.experiment
    return loader_of(
        task.test,
        extraction.transform,
        batch_size=experiment.extract_batch_size,
        workers=experiment.workers,
        device=extraction.extractor.device,
    )


def middle(run: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `run` after a first time."""
    run()
    return median(seconds(run) for _ in range(repeats))


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes until the device has done all of it."""
    wait_for_device()
    start = time.perf_counter()
    run()
    wait_for_device()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
