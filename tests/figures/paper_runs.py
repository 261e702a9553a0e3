"""Tiny run folders for the tests of the papers' tables."""

import math

from utils.runs.run import Run

MVTEC = (
    *("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush"),
    *("transistor", "zipper", "carpet", "grid", "leather", "tile", "wood"),
)
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def semantic(dataset="cifar10", method_name="noco", **changes):
    config = {"dataset": dataset, "method_name": method_name, "data_root": "d", "categories": []}
    config |= {"backbone": "resnet152.tv_in1k", "weights": "auto", "layers": [4]}
    return config | {"select": "last", "protocol": "one-vs-rest", "method": {"norm": 1.0}} | changes


def structured(dataset="mvtec", method_name="noco", **changes):
    config = semantic(dataset, method_name) | {"backbone": "wide_resnet50_2.tv_in1k"}
    del config["protocol"]
    return config | {"layers": [1, 2, 3], "patch_size": 3} | changes


def simplenet(dataset="mvtec", layers=(2, 3), adaptor="linear", loss="truncated_l1", **changes):
    method = {"adaptor": adaptor, "loss": loss, "sigma": 0.015}
    return structured(dataset, "simplenet", layers=list(layers), method=method, **changes)


def write_run(folder, config, values, *, select="last", **columns):
    """A run with image AUROC {(category, seed): fraction}; a column may be a function of it."""
    categories = list(dict.fromkeys(category for category, _ in values))
    seeds = sorted({seed for _, seed in values})
    run = Run.open(folder, config, categories=categories, seeds=seeds, command=["x"], device="cpu")
    columns = {"pixel_auroc": math.nan, "trainable": 1_000_000} | columns
    for (category, seed), value in values.items():
        row = {"category": category, "seed": seed, "select": select, "image_auroc": value}
        row |= {name: of(value) if callable(of) else of for name, of in columns.items()}
        run.finish({(category, seed): [row]})
    (folder / "metrics.jsonl").touch()
    return folder


def higher(value):
    """Pixel AUROC a hundredth above an image AUROC."""
    return value + 0.01


def constant(categories, value, seeds=(0,)):
    return {(category, seed): value for category in categories for seed in seeds}
