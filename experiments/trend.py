"""How a tree's gap to its baseline goes with the width k: tables, and a figure over 1/k.

    python -m experiments.trend results/trend/k4 --output_file trend.png

takes the published rows of each width that is named (`python -m experiments.publish
runs/cpu-k2/table --results results/trend/k2`). The law that is tested says that the gap is c / k
with one c for each row: a saving of weights costs in proportion to 1/k. Where another power of 1/k
fits the gaps better, the table says which. Both are fitted to the widths below the paper's k = 8,
so that what they say of it stays as it was when that is measured. Each preset has its own trend.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import utils
from experiments.rows import RESULTS, check_same, find_results
from experiments.tables import write_into

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = {"deep_2-2-2": "learned groups", "deep_2-2-2-R": "random groups", "narrow": "narrow"}
# c in points, from WRN-16-2 with another schedule, when no other width's gap had been measured.
PREDICTED = {"deep_2-2-2": 7.6, "deep_2-2-2-R": 10.3, "narrow": 5.4}
PAPERS_WIDTH = 8


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__)
    parser.usage = "%(prog)s [FOLDER ...] --FLAG VALUE ..."
    add = parser.add_argument
    shown = f"published rows, a folder a width (default: {RESULTS} and {RESULTS}/trend/k*)"
    add("folders", nargs="*", type=utils.path, help=shown)
    add("--output_file", type=utils.path, default="", help="the figure (default: none is drawn)")
    add("--write", metavar="FILE", type=utils.path, default="", help="put the tables into a page")
    flags = parser.parse_args(argv)
    flags.folders = flags.folders or [RESULTS, *sorted(glob.glob(f"{RESULTS}/trend/k*"))]
    return flags


def by_preset(folders: Sequence[str]) -> dict[str, dict[float, dict[str, list[dict]]]]:
    """`by_width` of the folders of each preset.

    Raises:
        ValueError: as `by_width`, or presets are mixed and one has a single width: no trend.
    """
    folders_by_preset: dict[str, list[str]] = {}
    for folder in folders:
        first = next(iter(find_results(folder).values()))[0]
        folders_by_preset.setdefault(first["preset"], []).append(folder)
    if min(map(len, folders_by_preset.values())) == 1:
        return {next(iter(folders_by_preset)): by_width(folders)}
    return {preset: by_width(some) for preset, some in folders_by_preset.items()}


def by_width(folders: Sequence[str]) -> dict[float, dict[str, list[dict]]]:
    """Results of every row at every width k, ascending.

    Raises:
        ValueError: a folder has no baseline; two are of one width, or differ in what they should
            have in common.
    """
    widths: dict[float, dict[str, list[dict]]] = {}
    for folder in folders:
        rows = find_results(folder)
        if "baseline" not in rows:
            raise ValueError(f"{folder} has no baseline, from which a gap is counted: publish one")
        k = float(rows["baseline"][0]["network"].rpartition("-")[2])
        if k in widths:
            raise ValueError(f"{folder} is of k = {k:g}, as another folder is: name one of them")
        widths[k] = {row: rows[row] for row in ("baseline", *ROWS) if row in rows}
    for name in ("preset", "dataset", "step"):
        check_same(name, [rows["baseline"][0] for rows in widths.values()], "the trend")
    return dict(sorted(widths.items()))


def gaps(widths: dict[float, dict[str, list[dict]]]) -> dict[str, list[tuple[float, float, float]]]:
    """(k, gap, standard error) of every row, k ascending; in points of test error."""
    gaps_by_row: dict[str, list] = {row: [] for row in ROWS}
    for k, rows in widths.items():
        base, base_error = error_of(rows["baseline"])
        for row in ROWS.keys() & rows.keys():
            mean, error = error_of(rows[row])
            gaps_by_row[row].append((k, mean - base, float(np.hypot(error, base_error))))
    return {row: points for row, points in gaps_by_row.items() if points}


def error_of(results: Sequence[dict]) -> tuple[float, float]:
    """Mean test error in %, and its standard error, as if all seeds had had images of their own."""
    errors = [result["error"] for result in results]
    mean, images = float(np.mean(errors)), sum(result["num_examples"] for result in results)
    return 100 * mean, 100 * (mean * (1 - mean) / images) ** 0.5


def narrower(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Those of widths below the paper's, which the law is fitted to; all, where there are none."""
    return [point for point in points if point[0] < PAPERS_WIDTH] or list(points)


def fit(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """c of the law gap = c / k, with its standard error: a line through 0, by least squares."""
    k, gap, error = np.array(points).T
    weight = 1 / (k * error) ** 2
    return float(np.sum(weight * gap * k) / np.sum(weight)), float(np.sum(weight) ** -0.5)


def has_power(points: Sequence[tuple[float, float, float]]) -> bool:
    """Whether `fit_power` can be made: of two widths at least, and gaps above 0."""
    return len(points) > 1 and min(gap for _, gap, _ in points) > 0


def fit_power(points: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """a of gap = b / k^a, its standard error, and b: a line through logarithms, so gaps above 0."""
    k, gap, error = np.array(points).T
    (slope, log_b), covariance = np.polyfit(
        np.log(k), np.log(gap), 1, w=gap / error, cov="unscaled"
    )
    return -float(slope), float(covariance[0, 0] ** 0.5), float(np.exp(log_b))


def error_table(widths: dict[float, dict[str, list[dict]]]) -> str:
    """Test errors, of several seeds their mean and how many."""
    lines = [["test error, % (seeds)", *(f"k = {k:g}" for k in widths)]]
    for row, name in {"baseline": "not split", **ROWS}.items():
        found = [rows.get(row, []) for rows in widths.values()]
        if any(found):
            lines.append([name, *(f"{error_of(x)[0]:.2f} ({len(x)})" if x else "" for x in found)])
    return utils.markdown_table(lines)


def gap_table(gaps_by_row: dict[str, list[tuple[float, float, float]]]) -> str:
    """Gaps, c beside the prediction, the power of 1 / k that fits best, and k = 8 by either."""
    widths = sorted({k for points in gaps_by_row.values() for k, *_ in points})
    lines = [["gap to the baseline, points", *(f"k = {k:g}" for k in widths), "c", "predicted c",
              "k = 8 by c / k", "best power", "k = 8 by it"]]  # fmt: skip
    for row, points in gaps_by_row.items():
        by_width = {k: f"{gap:.2f} ± {error:.2f}" for k, gap, error in points}
        points = narrower(points)
        c, error = fit(points)
        cells = [f"{c:.1f} ± {error:.1f}", f"{PREDICTED[row]:g}", f"{c / PAPERS_WIDTH:.2f}"]
        if has_power(points):
            power, error, b = fit_power(points)
            cells += [f"{power:.2f} ± {error:.2f}", f"{b / PAPERS_WIDTH**power:.2f}"]
        else:
            cells += ["", ""]
        lines.append([ROWS[row], *(by_width.get(k, "") for k in widths), *cells])
    return utils.markdown_table(lines)


def page(presets: dict[str, dict[float, dict[str, list[dict]]]]) -> str:
    """Both tables of each preset."""
    parts = []
    for preset, widths in presets.items():
        parts += [f"Preset `{preset}`:"] if len(presets) > 1 else []
        parts += [error_table(widths), gap_table(gaps(widths))]
    return "\n\n".join(parts)


def draw(presets: dict[str, dict[str, list[tuple[float, float, float]]]]) -> Figure:
    """`gaps` of each preset over 1/k; the law and the best power, fitted; predictions."""
    with utils.surroundings():  # as in report/figures.py
        from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(presets), 4.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(presets), squeeze=False)[0]
    for axes, preset in zip(panels, presets, strict=True):
        _draw_gaps(axes, presets[preset])
        axes.set_title(f"preset {preset}" if len(presets) > 1 else "")
    return figure


def _draw_gaps(axes: Axes, gaps_by_row: dict[str, list[tuple[float, float, float]]]) -> None:
    widths = sorted({k for points in gaps_by_row.values() for k, *_ in points})
    x = np.linspace(1e-3, 1.05 / widths[0], 200)
    lowest, legend = 0, []
    for number, (row, points) in enumerate(gaps_by_row.items()):
        k, gap, error = np.array(points).T
        colour, aside = f"C{number}", 0.01 * (number - 1) * x[-1]  # so that none hides another
        bars = axes.errorbar(1 / k + aside, gap, error, fmt="o", color=colour, capsize=3)
        bars.set_label(ROWS[row])
        legend.append(bars)
        lowest = min(lowest, *(gap - error))
        points = narrower(points)
        axes.plot(x, fit(points)[0] * x, color=colour, linewidth=1)
        axes.plot(x, PREDICTED[row] * x, color=colour, linewidth=1, linestyle=":")
        if has_power(points):
            power, _, b = fit_power(points)
            axes.plot(x, b * x**power, color=colour, linewidth=1, linestyle="--")
    for name, style in (("c / k, fitted", "-"), ("best power of 1 / k", "--"), ("predicted", ":")):
        legend += axes.plot([], [], color="grey", linewidth=1, linestyle=style, label=name)
    ticks = [*widths, *([] if PAPERS_WIDTH in widths else [PAPERS_WIDTH])]
    axes.set_xticks([1 / k for k in ticks], [f"1/{k:g}" if k != 1 else "1" for k in ticks])
    axes.set(xlabel="1 / k", ylabel="test error above the baseline's, points")
    axes.set(xlim=(0, None), ylim=(lowest, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=legend, frameon=False)


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    presets = by_preset(flags.folders)
    gaps_by_preset = {preset: gaps(widths) for preset, widths in presets.items()}
    if not all(gaps_by_preset.values()):
        raise ValueError(f"there are none of the rows {', '.join(ROWS)}: publish some")
    text = page(presets)
    print(text)
    if flags.output_file:
        utils.check_file(flags.output_file, "output_file")
        draw(gaps_by_preset).savefig(flags.output_file)
        print(f"\nwritten: {flags.output_file}")
    if flags.write:
        write_into(flags.write, {"trend": text})
        print(f"\nwritten into {flags.write}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
