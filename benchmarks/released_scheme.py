"""NoCo on stored features against the released scheme, stage by stage.

    python -m benchmarks.released_scheme                                    # the embedded demo
    python -m benchmarks.released_scheme --data-root MY_IMAGES --category tile

The released structured script decodes the images and runs the backbone over them in every epoch,
and after every epoch over the test set too, where it upsamples the maps, blurs them one by one with
SciPy and computes image and pixel AUROC with scikit-learn. Ours reads every image once. Both are
timed side by side in one run: ours in full, the released scheme for `--measured` epochs, each with
its evaluation, and projected (it is linear in them). Both take the same head steps, images and
backbone; "ours, evaluated in every epoch" also looks at the test set as often as the other. The
released scheme runs the backbone as timm builds it and reads images in worker processes; ours runs
what `models.backbone.rewriting` makes of it and reads as our scripts do, in threads without a GPU.
With `--threads` both read that way.
"""

import argparse
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.images import read_tasks
from datasets.reading.loading import BatchLoader, images_of
from datasets.reading.masks import read_masks
from datasets.reading.transforms import PairTransform
from datasets.samples import ImageSet, Task
from models.backbone.extractor import FrozenExtractor
from models.detector import FeatureShape
from models.methods.noco import Noco, NocoOptions
from utils.device import keep_freed_memory, pick_device
from utils.evaluation.scoring import Scoring
from utils.evaluation.test_set import TestSet
from utils.features.bank import FeatureBank

EPOCHS = 50
LEARNING_RATE = 1e-4
BATCH_SIZE = 16
BLUR_SIGMA = 4.0


class Clock:
    """Seconds spent in named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start


def main() -> None:
    """Time both schemes and print their stages relative to our total."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of categories; the demo without it")
    parser.add_argument("--category", default="brick")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measured", type=int, default=1, help="epochs of the released scheme")
    parser.add_argument("--threads", action="store_true", help="in the released scheme too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # of processes without a GPU
    keep_freed_memory()
    (task,) = read_tasks(arguments.data_root, arguments.category)
    bench = Bench(task, arguments)
    bench.released(epochs=1)  # warm
    released = bench.released(epochs=arguments.measured)
    scale = EPOCHS / arguments.measured
    ours, watched = bench.ours(watch=False), bench.ours(watch=True)
    total = sum(ours.values())
    print(f"{len(task.train)} train and {len(task.test)} test images, {EPOCHS} epochs\n")
    print("| stage | released | ours | ours, evaluated in every epoch |")
    print("| --- | ---: | ---: | ---: |")
    for name in released:
        cells = [scale * released[name], ours[name], watched[name]]
        print(f"| {name} | {' | '.join(f'{seconds / total:.3f}' for seconds in cells)} |")
    sums = [scale * sum(released.values()), total, sum(watched.values())]
    print(f"| **total** | {' | '.join(f'**{seconds / total:.2f}**' for seconds in sums)} |")


class Bench:
    """Both schemes on one category."""

    def __init__(self, task: Task, arguments: argparse.Namespace) -> None:
        self.transform = PairTransform(arguments.image_size, None, "opencv_square")
        self.task = task
        self.size = arguments.image_size
        self.workers = arguments.workers
        self.processes = not arguments.threads
        self.extractor = FrozenExtractor(arguments.backbone, tuple(arguments.layers))
        self.extractor.to(pick_device("auto"))
        # The released scheme runs the backbone as it was built, ours rewritten.
        self.as_built = FrozenExtractor(arguments.backbone, tuple(arguments.layers), rewrite=False)
        self.as_built.to(self.extractor.device)
        self.labels = torch.from_numpy(task.test_labels)
        assert task.test.paths is not None
        assert task.masks is not None
        self.masks = read_masks(task.test.paths, task.masks, self.transform)

    def loader(self, images: ImageSet, batch_size: int, *, processes: bool = False) -> BatchLoader:
        """Return batches of decoded images."""
        return BatchLoader(
            images_of(images, self.transform),
            batch_size=batch_size,
            workers=self.workers,
            skip_unreadable=False,
            for_gpu=processes or self.extractor.device.type == "cuda",
        )

    def head(self, epochs: int) -> Noco:
        """Return an untrained head."""
        options = NocoOptions(epochs=epochs, learning_rate=LEARNING_RATE, batch_size=BATCH_SIZE)
        head = Noco(FeatureShape(self.extractor.stage_channels), options)
        return head.to(self.extractor.device)

    def ours(self, *, watch: bool) -> dict[str, float]:
        """Run our scheme in full; return the seconds of its stages."""
        clock = Clock()
        with clock.stage("decode + backbone, train"):
            train = FeatureBank.extract(self.extractor, self.loader(self.task.train, 32))
        with clock.stage("decode + backbone, test"):
            bank = FeatureBank.extract(self.extractor, self.loader(self.task.test, 32))
        names = [""] * len(bank)
        test = TestSet(
            bank, self.labels, names=names, kinds=names, masks=self.masks,
            scoring=Scoring(self.size, BLUR_SIGMA),
        )  # fmt: skip
        head = self.head(EPOCHS)

        watcher = Watcher(head, test, clock)
        before = sum(clock.seconds.values())
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        head.fit(train, generator=generator, monitor=watcher if watch else None)
        fit = time.perf_counter() - start
        watched = sum(clock.seconds.values()) - before
        clock.seconds["head steps"] = fit - watched
        if not watch:
            watcher(EPOCHS, {})
        return clock.seconds

    def released(self, *, epochs: int) -> dict[str, float]:
        """Run some epochs of the released scheme; return the seconds of its stages."""
        clock = Clock()
        head = self.head(1)
        steps = Steps(head)
        for _ in range(epochs):
            train = self.loader(self.task.train, BATCH_SIZE, processes=self.processes)
            loader = iter(train)
            while True:
                with clock.stage("decode + backbone, train"):
                    batch = next(loader, None)
                    features = None if batch is None else self.as_built(batch.images).clone()
                if features is None:
                    break
                with clock.stage("head steps"):
                    steps.take(features)
            maps = []
            loader = iter(self.loader(self.task.test, BATCH_SIZE, processes=self.processes))
            while True:
                with clock.stage("decode + backbone, test"):
                    batch = next(loader, None)
                    features = None if batch is None else self.as_built(batch.images)
                if features is None:
                    break
                with clock.stage("head, upsampling, blur"):
                    maps.extend(self.smooth(head, features))
            with clock.stage("metrics"):
                stacked = np.stack(maps)  # (N, S, S)
                roc_auc_score(self.labels.numpy(), stacked.max(axis=(1, 2)))
                roc_auc_score(self.masks.numpy().ravel(), stacked.ravel())
        return clock.seconds

    @torch.no_grad()
    def smooth(self, head: Noco, features: Tensor) -> list[np.ndarray]:
        """Upsample maps and blur them one by one, as the released script does."""
        maps = F.interpolate(head(features)[:, None], self.size, mode="bilinear")[:, 0]
        return [gaussian_filter(each, sigma=BLUR_SIGMA) for each in maps.cpu().numpy()]


@dataclass(frozen=True)
class Watcher:
    """Evaluates a head on the test set after each epoch."""

    head: Noco
    test: TestSet
    clock: Clock
    scores_steps: bool = True

    def __call__(self, _step: int, _values: dict[str, float], /) -> None:
        """Take the end of an epoch."""
        with self.clock.stage("head, upsampling, blur"):
            scores = self.test.score(self.head)
        with self.clock.stage("metrics"):
            self.test.measure(scores)


class Steps:
    """The optimizer steps of `Noco.fit`, one at a time."""

    def __init__(self, head: Noco) -> None:
        self.head = head
        self.optimizer = torch.optim.AdamW(
            head.parameters(),
            lr=LEARNING_RATE,
            weight_decay=head.options.weight_decay,
            amsgrad=True,
        )

    def take(self, features: Tensor) -> None:
        """Take one step on features (B, C, H, W)."""
        excess = F.relu(self.head(features) - self.head.radius**2)
        loss = excess.mean() / self.head.options.nu
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


if __name__ == "__main__":
    main()
