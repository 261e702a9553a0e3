"""One extraction for all one-class tasks against extracting again in every epoch of every class.

    python -m benchmarks.one_extraction --data-root MY_CLASSES
    python -m benchmarks.one_extraction                          # scikit-learn's digits

The released semantic scripts run the backbone over a class's training images in each epoch, and
over the whole test set at each evaluation. `--cache none` does the same, so the training script is
timed both ways in one run, evaluated after every epoch (`--monitor-test`) or at the end only: ours
in full, with its start, for all classes and epochs; the other for one class and `--measured` epochs
beyond the first, and projected (it is linear in both).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.experiments import SCRIPTS, read_tasks

EPOCHS = 10  # of the released CIFAR script


def main() -> None:
    """Time both schemes and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder of classes; digits without it")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--measured", type=int, default=9, help="epochs of the other scheme")
    arguments = parser.parse_args()
    script, words = "train_mnist", ["digits", "noco"]
    if arguments.data_root is not None:
        script, words = "train_cifar10", ["folder", "noco", "--data-root", str(arguments.data_root)]
    words += ["--backbone", arguments.backbone, "--image-size", str(arguments.image_size)]
    words += ["--crop-size", "none", "--overlays", "0"]
    tasks = read_tasks(SCRIPTS[script].parse(words))

    def seconds(*options: str, epochs: int) -> float:
        command = [sys.executable, f"{script}.py", *words, "--method.epochs", str(epochs), *options]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as output:
            subprocess.run([*command, "--output", output], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    def an_epoch(*options: str) -> float:
        """Return what an epoch of one class takes where nothing is stored: what more add."""
        more = 1 + arguments.measured
        one = ("--categories", tasks[0].category, "--cache", "none", *options)
        return (seconds(*one, epochs=more) - seconds(*one, epochs=1)) / arguments.measured

    seconds(epochs=1)  # warm
    ours = seconds("--monitor-test", epochs=EPOCHS)
    all_epochs = len(tasks) * EPOCHS
    watched, epochs = all_epochs * an_epoch("--monitor-test"), all_epochs * an_epoch()
    print(f"{words[0]}: {len(tasks)} tasks, {EPOCHS} epochs\n")
    print("| scheme | relative time |\n| --- | ---: |")
    print("| one extraction, all heads (measured in full) | 1 |")
    print(f"| backbone in every epoch and evaluation (projected) | {watched / ours:.1f} |")
    print(f"| backbone in every epoch only (projected) | {epochs / ours:.1f} |")


if __name__ == "__main__":
    main()
