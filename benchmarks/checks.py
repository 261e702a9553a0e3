"""What looking for other data, unused images and leaks costs of a run that nothing is stored of.

    python -m benchmarks.checks --data-root MY_IMAGES --category tile

One run of the training script in this process, its checks timed as they happen: digests of all
files, the walk through the folder, thumbnails, and twins.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import train_mvtec

CHECKS = {
    "digests of images and masks": "pipeline.made_of.contents_of",
    "what is not used": "datasets.tasks.structured.unused_images",
    "thumbnails": "utils.features.bank.thumbnails",
    "twins": "pipeline.leaks.find_twins",
}


def main() -> None:
    """Time the run and its checks, and print their shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--category", required=True)
    parser.add_argument("--method", default="noco_cf")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    arguments = parser.parse_args()
    words = ["folder", arguments.method, "--data-root", str(arguments.data_root)]
    words += ["--categories", arguments.category, "--backbone", arguments.backbone]
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start  # type: ignore[assignment]

        return call

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, NOCO_CACHE=f"{folder}/cache"))
        for name, place in CHECKS.items():
            module, _, function = place.rpartition(".")
            there = getattr(__import__(module, fromlist=[function]), function)
            stack.enter_context(mock.patch(place, timed(name, there)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        start = time.perf_counter()
        train_mvtec.main([*words, "--output", folder, "--overlays", "0"])
        whole = time.perf_counter() - start
    print("| check | share of the run |\n| --- | ---: |")
    for name in CHECKS:
        print(f"| {name} | {100 * spent[name] / whole:.2f} % |")
    print(f"| all | {100 * sum(spent.values()) / whole:.2f} % |")


if __name__ == "__main__":
    main()
