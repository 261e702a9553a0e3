"""Scores new images with a finished run, whatever script made it.

    python predict.py RUN photos/                            # a folder and all below it
    python predict.py RUN "photos/**/*.png" --out scored     # scores.csv and maps into scored/
    python predict.py RUN other_normals/ --calibrate         # once: thresholds with a guarantee
    python predict.py RUN photos/ --false-alarm-rate 0.01    # then: p-values and decisions
    python predict.py RUN photos/ --json | jq .score         # one object per line, no files
    python predict.py RUN photos/ --fail-on-anomaly          # exit code 1 if there are any

RUN is a run folder, results/<dataset>-<method>/<run>. Its files are data: a changed configuration
or head gives an error and is never executed. Exit code: 0; 1 with --fail-on-anomaly where an image
is anomalous; 2 where something went wrong, unreadable images (named in scores.csv) among it unless
--skip-unreadable. utils/runs/predictions.py says what is written.
"""

import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tqdm import tqdm

from configs.prediction import PredictOptions
from datasets.contents import file_digest
from datasets.reading.finding import find_copies, find_images
from datasets.reading.images import is_image_file, read_image
from datasets.reading.restoring import restore_map
from datasets.reading.unused import in_words, unused_images
from datasets.samples import DataError
from pipeline.experiments import read_tasks
from utils.cli import exits_cleanly
from utils.errors import UsageError
from utils.runs.files import file_stem
from utils.runs.finished import choose_pair
from utils.runs.made_of import load_made_of, made_of_file
from utils.runs.predictions import Pictures, Prediction, PredictionFiles

if TYPE_CHECKING:
    from models.detector import Detector
    from pipeline.finished import FinishedRun


@exits_cleanly(interrupted="interrupted; what was scored is in scores.csv.part")
def main(argv: Sequence[str] | None = None) -> int:
    """Score images, write and print what was found, and return the exit code."""
    options = tyro.cli(
        PredictOptions,
        args=argv,
        prog="predict.py",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    paths = find_images(options.images)
    for folder in (Path(word) for word in options.images if Path(word).is_dir()):
        others = [path for path in unused_images(folder, paths) if not is_image_file(path)]
        if others:
            say(f"{folder}: not used, though it looks like an image: {in_words(others, folder)}")

    from pipeline.finished import load_run  # only now: it imports torch
    from utils.evaluation.calibration import calibration_file, decision_rule, load_calibration

    finished = load_run(options.run, device=options.device, weights=options.weights)
    category, seed = choose_pair(finished.run, options.category, options.seed)
    detector = finished.detector(category, seed, options.suffix)
    if options.calibrate:
        calibrate(options, finished, detector, category, seed, paths)
        return 0

    head = finished.run.head_path(category, seed, options.suffix)
    calibration_path = calibration_file(finished.run.folder, category, seed, options.suffix)
    rule = decision_rule(
        load_calibration(calibration_path, head=head),
        rate=options.false_alarm_rate,
        default=finished.experiment.false_alarm_rate,
        threshold=options.threshold,
        ways=f"python predict.py {options.run} NORMAL_IMAGES... --calibrate, training with "
        "--calibration-share, or --threshold",
    )
    if options.fail_on_anomaly and rule.threshold is None:
        raise UsageError("--fail-on-anomaly: without calibration or --threshold nothing decides")
    files = open_files(options, finished, category, seed, rule.threshold)
    num_anomalous = num_errors = 0
    start = time.perf_counter()
    with files or nullcontext():
        for found in predictions(options, finished, detector, paths):
            rows = [one.row(rule) for one in found]
            if files is not None:
                files.add(found, rows)
            if options.json:
                sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
                sys.stdout.flush()
            num_anomalous += sum(row["decision"] == "anomalous" for row in rows)
            num_errors += sum(row["error"] is not None for row in rows)
    rate = len(paths) / (time.perf_counter() - start)

    decided = "" if rule.threshold is None else f"{num_anomalous} anomalous, "
    where = "" if files is None else f"; {files.folder / 'scores.csv'}"
    say(f"{len(paths)} images, {decided}{num_errors} unreadable, {rate:.1f} images/s{where}")
    if num_errors and not options.skip_unreadable:
        say("exit code 2: the column `error` names unreadable images; --skip-unreadable accepts it")
        return 2
    return 1 if options.fail_on_anomaly and num_anomalous else 0


def open_files(
    options: PredictOptions,
    finished: "FinishedRun",
    category: str,
    seed: int,
    threshold: float | None,
) -> PredictionFiles | None:
    """Open the folder of the predictions; None where only stdout is asked for."""
    run, suffix = finished.run, options.suffix
    try:
        kinds = options.map_kinds(has_maps=finished.experiment.map_size is not None)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.out is None and options.json:
        return None
    pictures = None
    if kinds:
        # The head that is best by pixel AUROC has no image scores of its own.
        test = run.load_scores(category, seed, "" if options.head == "pixel" else suffix)
        pictures = Pictures(
            kinds=kinds,
            read=functools.partial(read_image, reading=finished.transform.reading),
            restore=functools.partial(restore_map, finished.transform),
            errors=(DataError,),
            test_maxima=(test["score"], test["label"]),
            threshold=threshold,
            threads=options.workers,
        )
    folder = run.folder / "predictions" / file_stem(category, seed, suffix)
    about = {"run": str(run.folder), "category": category, "seed": seed, "head": options.head}
    return PredictionFiles(options.out or folder, pictures, about)


def predictions(
    options: PredictOptions, finished: "FinishedRun", detector: "Detector", paths: Sequence[Path]
) -> Iterator[list[Prediction]]:
    """Score images batch by batch, in order; nothing of a batch is kept."""
    from datasets.reading.loading import BatchLoader, ImageDataset
    from pipeline.features import boxes_of, in_windows

    numbers = {path: number for number, path in enumerate(paths)}
    has_maps = finished.experiment.map_size is not None
    images = in_windows(ImageDataset(paths, finished.transform), finished.experiment)
    loader = BatchLoader(
        images,
        batch_size=options.batch_size or finished.experiment.extract_batch_size,
        workers=options.workers,
        skip_unreadable=True,
        for_gpu=finished.device.type == "cuda",
    )
    told = 0
    with tqdm(total=len(paths), desc="images", leave=False, disable=None) as bar:
        for batch in loader:
            scores = finished.score(detector, batch.images, boxes_of(images, batch.indices))
            maps = [m.numpy() for m in scores.maps.cpu()] if has_maps else []
            found = [
                Prediction(i, paths[i], float(score), maps[place] if maps else None)
                for place, (i, score) in enumerate(zip(batch.indices, scores.images, strict=True))
            ]
            found += _unreadable(loader.skipped[told:], numbers)
            told = len(loader.skipped)
            yield sorted(found, key=lambda one: one.number)
            bar.update(len(found))
    yield _unreadable(loader.skipped[told:], numbers)


def _unreadable(
    skipped: Sequence[tuple[Path | int, str]], numbers: dict[Path, int]
) -> list[Prediction]:
    paths = [(Path(str(path)), error) for path, error in skipped]
    return [Prediction(numbers[path], path, error=error) for path, error in paths]


def calibrate(
    options: PredictOptions,
    finished: "FinishedRun",
    detector: "Detector",
    category: str,
    seed: int,
    paths: Sequence[Path],
) -> None:
    """Store the scores of normal images that the run has not seen."""
    from utils.evaluation.calibration import calibration_file, save_calibration

    before = load_made_of(made_of_file(finished.run.folder, category, seed))
    if before is not None and (digests := before.training_digests):
        copies = [path for path in paths if file_digest(path) in digests]
    else:  # the run is of an earlier version, or its classes share their images
        copies = find_copies(paths, training_images(finished, category))
    if copies:
        raise UsageError(
            f"{len(copies)} of {len(paths)} images are training images of {category!r} (first: "
            f"{copies[0]}): a threshold from what the head was fitted on promises nothing"
        )
    found = [one for batch in predictions(options, finished, detector, paths) for one in batch]
    for one in found:
        if one.error is not None and not options.skip_unreadable:
            raise DataError(f"{one.error}; pass --skip-unreadable to leave such images out")
    scored = [one for one in found if one.score is not None]
    if not scored:
        raise DataError("not one image could be read: nothing to calibrate with")
    path = calibration_file(finished.run.folder, category, seed, options.suffix)
    calibration = save_calibration(
        path,
        head=finished.run.head_path(category, seed, options.suffix),
        source="given",
        names=[str(one.path) for one in scored],
        scores=[one.score for one in scored if one.score is not None],
    )
    say(
        f"{len(scored)} normal images: false-alarm rates from {calibration.smallest_rate:.4g} can "
        f"be asked for; {path}"
    )


def training_images(finished: "FinishedRun", category: str) -> list[Path]:
    """Return the files a category was trained on; none, said on stderr, where nobody can know."""
    try:
        (task,) = read_tasks(finished.experiment, [category])
        if task.train.paths is not None:
            return [task.train.paths[i] for i in task.train_indices]
        reason = "they are arrays in a file"
    except DataError as error:
        reason = str(error)
    say(f"not compared with the run's training images: {reason}")
    return []


def say(text: str) -> None:
    """Tell the user, on stderr: stdout is for --json."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
