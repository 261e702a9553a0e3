"""--help and a mistyped option answer at once: torch and its like take seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "torchvision", "timm", "kornia", "sklearn", "anomalib", "onnx")
ANSWERS = {
    "train_mvtec": [
        "--help",
        "visa anomalib:padim --help",
        "--epochz 3",
        "mvtecc",
        "--data-root nowhere",
    ],
    "train_cifar10": ["--help", "cifar10 panda --colour", "--seeds 0 0"],
    "train_mnist": ["--help", "digits --method.epochs 0", "mnist deep_svdd --backbone x"],
    "predict": ["--help", "run image.png --colour"],
    "evaluate": ["--help", "run --colour"],
    "export": ["--help", "run --opset 3"],
    "sweep": ["--help", "--colour", "--datasets dem --dry-run", "--datasets demo --options epochs"],
}
# Each line: the words, the exit code, and what has been imported by then.
ASK = """
import contextlib, importlib, io, json, sys
slow, answers = json.loads(sys.argv[1])
for script, lines in answers.items():
    for words in lines:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                code = importlib.import_module(script).main(words.split())
            except SystemExit as end:
                code = end.code
        print(json.dumps([script, words, code, [name for name in slow if name in sys.modules]]))
"""


def test_scripts_answer_without_slow_imports():
    """All in one process, which asks after each answer: the first that imports is the one."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps([SLOW, ANSWERS])],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    expected = [
        [script, words, 0 if words.endswith("--help") else 2, []]
        for script, lines in ANSWERS.items()
        for words in lines
    ]
    assert [json.loads(line) for line in asked.stdout.splitlines()] == expected
