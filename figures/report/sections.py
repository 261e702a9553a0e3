"""What a report shows of one run, gathered from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures.report.charts import Chart, histogram_chart, roc_chart, selection_chart, step_chart
from figures.report.kinds import CategoryKinds, Finding, kinds_of, read_findings, sheet_width
from figures.report.leaks import LeakReport, leak_report
from figures.report.pictures import Budget, Overlays, Picture, Strip, overlays_of, thumbnail
from figures.report.scores import LAST, Ranked, Scored, image_auroc, ranked, read_scores
from figures.report.tables import (
    Facts,
    false_alarms,
    head_facts,
    other_facts,
    results_table,
    unfinished_pairs,
)
from figures.report.thresholds import Thresholds, page_data, thresholds_of
from figures.shared.run_log import LoggedRun, Pair, images_of
from utils.runs.files import flat, read_object
from utils.tables.table import Table

KINDS_SHARE = 1 / 3
"""Of the bytes of all pictures of a run, at most, for those of kinds of defects."""
FEW_KINDS = 12  # whose sheets are open


@dataclass(frozen=True)
class Limits:
    """How much of a run the page shows.

    Attributes:
        num_images: listed images of each category.
        thumbnails: whether they get a small picture.
        num_bytes: of all pictures of the run.
        num_characters: of the scores that the page recounts, of all categories of the run.
    """

    num_images: int
    thumbnails: bool
    num_bytes: int
    num_characters: int


@dataclass(frozen=True)
class Hard:
    """A line of the list of the most wrong images."""

    image: Ranked
    picture: Picture | None
    remark: str


@dataclass(frozen=True)
class Category:
    """What the page shows of one category.

    Attributes:
        name: of the category.
        charts: of the first seed, and those of all seeds.
        more_charts: histograms of the other seeds.
        missing: why a chart is missing, or "".
        overlays: pictures of maps.
        hardest: the listed images, the most wrong first.
        kinds: of defect among all of its images.
        disagreements: pairs whose scores do not fit results.csv.
        thresholds: of each seed.
        data: what the page recounts, of the first seeds.
    """

    name: str
    charts: list[Chart]
    more_charts: list[Chart]
    missing: str
    overlays: Overlays
    hardest: list[Hard]
    kinds: list[str]
    disagreements: list[str]
    thresholds: list[Thresholds]
    data: list[dict[str, Any]]


@dataclass(frozen=True)
class RunSections:
    """What the page shows of one run.

    Attributes:
        prefix: of the ids of its sections; "" where the page is about one run.
        label: what it is called among the runs of the page.
        title: method and images.
        folder: name of the run folder.
        facts: names and texts at its head.
        config: options, by dotted name.
        environment: likewise.
        random_weights: whether the backbone had no pretrained weights.
        unfinished: what has no result yet.
        table: of its results; None without any.
        categories: in order.
        leaks: near-duplicates.
        several_seeds: whether there are several.
        num_refused: pictures left out for size.
        found: kinds of defects, by finding.
        num_kinds_refused: pictures of them left out for size.
        false_alarms: what was recorded of them.
        other: further columns of results.csv.
    """

    prefix: str
    label: str
    title: str
    folder: str
    facts: list[tuple[str, str]]
    config: dict[str, str]
    environment: dict[str, str]
    random_weights: bool
    unfinished: list[str]
    table: Table | None
    categories: list[Category]
    leaks: LeakReport
    several_seeds: bool
    num_refused: int
    found: list[tuple[Finding, list[CategoryKinds]]]
    num_kinds_refused: int
    false_alarms: Facts | None
    other: Facts | None

    @property
    def strips(self) -> list[Strip]:
        """Strips of all categories, the most wrong first."""
        strips = [strip for category in self.categories for strip in category.overlays.strips]
        return sorted(strips, key=lambda strip: strip.image.urgency)

    @property
    def hardest(self) -> list[Hard]:
        """The listed images of all categories, the most wrong first."""
        listed = [hard for category in self.categories for hard in category.hardest]
        return sorted(listed, key=lambda hard: hard.image.urgency)

    @property
    def disagreements(self) -> list[str]:
        """Pairs whose scores do not fit results.csv."""
        return [pair for category in self.categories for pair in category.disagreements]

    @property
    def has_few_kinds(self) -> bool:
        """Whether the sheets of kinds of defects can all be open."""
        return sum(len(one.kinds) for _, shown in self.found for one in shown) <= FEW_KINDS


def sections_of(run: LoggedRun, limits: Limits, *, prefix: str = "") -> RunSections:
    """Gather what the page shows of a run, finished or not.

    Args:
        run: with its log.
        limits: of the page, for this run.
        prefix: of the ids of its sections.

    Raises:
        RunError: a file of it is corrupt.
    """
    folder, rows = run.run.folder, run.run.rows()
    pairs = list(dict.fromkeys([*((row["category"], row["seed"]) for row in rows), *_logged(run)]))
    names = list(dict.fromkeys(category for category, _ in pairs))
    found, kinds_budget = _found(folder, limits.num_bytes)
    num = max(1, len(names))
    budgets = {name: Budget((limits.num_bytes - kinds_budget.spent) // num) for name in names}
    # Before the overlays: a leak says more about a run than one picture of its maps.
    leaks = leak_report(run, names, budgets)
    seeds = {name: [seed for category, seed in pairs if category == name] for name in names}
    categories = [_category(run, name, seeds[name], budgets[name], limits, num) for name in names]
    environment = folder / "environment.json"
    record = read_object(environment) if environment.exists() else {}
    return RunSections(
        prefix=prefix,
        label=run.label,
        title=f"{run.run.config['method_name']} on {images_of(run.run.config)}",
        folder=folder.name,
        facts=head_facts(run.run.config, rows, record),
        config=flat(run.run.config),
        environment=flat(record),
        random_weights=run.run.config.get("weights") == "random",
        unfinished=unfinished_pairs(run.run.config, rows, pairs),
        table=results_table(folder, rows),
        categories=categories,
        leaks=leaks,
        several_seeds=len({seed for _, seed in pairs}) > 1,
        num_refused=sum(budget.num_refused for budget in budgets.values()),
        found=found,
        num_kinds_refused=kinds_budget.num_refused,
        false_alarms=false_alarms(rows),
        other=other_facts(rows),
    )


def _found(
    folder: Path, num_bytes: int
) -> tuple[list[tuple[Finding, list[CategoryKinds]]], Budget]:
    """Return each finding of a run with what is shown of it, and what their pictures took."""
    findings = read_findings(folder / "discovery")
    share = int(num_bytes * KINDS_SHARE)
    budget, width = Budget(share), sheet_width(findings, share)
    return [(finding, kinds_of(finding, width, budget)) for finding in findings], budget


def _logged(run: LoggedRun) -> list[Pair]:
    return [(record["category"], record["seed"]) for record in run.records]


def _category(
    run: LoggedRun,
    name: str,
    seeds: Sequence[int],
    budget: Budget,
    limits: Limits,
    num_categories: int,
) -> Category:
    """Gather what the page shows of a category."""
    scored = [one for seed in seeds if (one := read_scores(run.run, name, seed))]
    last = [one for seed in seeds if (one := read_scores(run.run, name, seed, LAST))]
    images = ranked(scored) if scored else []
    first = scored[0].seed if scored else seeds[0]
    drawn = run.run.config.get("overlays")
    drawn = drawn if isinstance(drawn, int) else 0
    overlays = overlays_of(run.run.overlays_folder(name, first), images, drawn, budget)
    hardest = []
    for image in images[: limits.num_images]:
        picture, remark = thumbnail(Path(image.path), budget) if limits.thumbnails else (None, "")
        hardest.append(Hard(image, picture, remark))
    thresholds = [thresholds_of(run.run, one) for one in scored]
    data = page_data(thresholds, limits.num_characters // num_categories)
    charts, more, missing = _charts(run, name, thresholds, last)
    kinds = sorted({image.kind for image in images})
    wrong = _disagreements(run.run.rows(), scored)
    return Category(name, charts, more, missing, overlays, hardest, kinds, wrong, thresholds, data)


def _charts(
    run: LoggedRun, name: str, thresholds: Sequence[Thresholds], last: Sequence[Scored]
) -> tuple[list[Chart], list[Chart], str]:
    """Return the charts of a category, those shown on demand, and why one is missing."""

    def of(event: str) -> dict[int, list[dict[str, Any]]]:
        return {
            seed: rs for (category, seed), rs in run.of_event(event).items() if category == name
        }

    scored = [one.scored for one in thresholds]
    charts: list[Chart] = []
    missing = "" if scored else "No scores were written yet."
    if scored and (chart := roc_chart(scored, last)):
        charts.append(chart)
    elif scored:
        missing = "No ROC curve: the test set has one class only."
    histograms = [histogram_chart(one.scored, one.first) for one in thresholds]
    charts += histograms[:1]
    chosen = {seed: records[-1] for seed, records in of("chosen").items()}
    steps = of("step")
    curve = selection_chart(of("selection"), chosen)
    if curve is None:
        curve = step_chart(steps, "image_auroc", "image AUROC on the test set", percent=True)
        if curve is not None and run.run.config.get("select") != "best_test":
            curve.note = "Logged beside the training; it chose nothing."
    loss = step_chart(steps, "loss", "training loss", percent=False)
    charts += [chart for chart in (curve, loss) if chart is not None]
    return charts, histograms[1:], missing


def _disagreements(rows: Sequence[Mapping[str, Any]], scored: Sequence[Scored]) -> list[str]:
    """Name the pairs whose scores do not give the image AUROC of results.csv."""
    found = []
    for one in scored:
        own = [row for row in rows if (row["category"], row["seed"]) == (one.category, one.seed)]
        # Where a run reports two states, these are the scores of the other one than the last.
        own = [row for row in own if row["select"] != "last"] or own
        written = own[0].get("image_auroc") if own else None
        measured = image_auroc(one)
        if isinstance(written, (int, float)) and abs(measured - written) > 1e-6:  # false for nan
            found.append(f"{one.category}, seed {one.seed}")
    return found
