"""ULSAD as its released code evaluates it: on the test set in three ways, said in every heading.

Its best epoch by test AUROC counts (`--select best_test`); quantiles are those of normal test
images (`--scale-on test`), and exist after the last epoch only; and the last images by path that
fill no batch of 32 are not scored (`--test-batches 32`).
"""

from dataclasses import replace

from models.methods.ulsad.ulsad import METHOD as ULSAD
from models.methods.ulsad.ulsad import UlsadOptions

METHOD = replace(
    ULSAD,
    options=UlsadOptions(quantiles="last_epoch"),
    experiment={
        "structured": {
            **ULSAD.experiment["structured"],
            "select": "best_test",
            "scale_on": "test",
            "test_batches": 32,
        }
    },
)
