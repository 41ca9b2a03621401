"""Pictures of what was learned; every function returns a matplotlib figure.

Colours: one for each group, and for a group of the classifier the same everywhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

import grouping
import resnet
from utils import surroundings

with surroundings():  # matplotlib reads MPLBACKEND, which a notebook sets to what is only there
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import text_to_path
    from matplotlib.ticker import EngFormatter

matplotlib.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
    "axes.titlesize": 10, "legend.frameon": False,
})  # fmt: skip

TERMS = {"cross_entropy": "cross entropy", "overlap": "overlap $R_D$",
         "weight_split": "weight split $R_W$", "uniform": "uniform $R_E$"}  # fmt: skip
MANY = 60  # classes of a group that are named, where no superclasses tell what is in it
ROOM = 12  # classes of a superclass whose names have room in its bar
HARD = "\N{NO-BREAK SPACE}"


def group_colour(number: int) -> tuple:
    """Colour of a group of the classifier."""
    return matplotlib.colormaps["tab10"](number % 10)


def _figure(
    rows: int, columns: int, width: float, height: float, **settings
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


# ---------------------------------------------------------------- how it went


def learning_curves(metrics: Sequence[dict]) -> Figure:
    """Accuracy in training and validation, and the terms of the objective, over the steps."""
    progress = [r for r in metrics if "loss" in r]
    terms = {name: text for name, text in TERMS.items() if progress and name in progress[0]}
    figure, ((left, right),) = _figure(1, 2, 10, 3.4)
    steps = [r["step"] for r in progress]
    left.plot(steps, [r["accuracy"] for r in progress], color="0.6", label="training batches")
    validations = [r for r in metrics if "val_accuracy" in r]
    left.plot(
        [r["step"] for r in validations], [r["val_accuracy"] for r in validations],
        "o-", color="black", markersize=3, label="validation",
    )  # fmt: skip
    left.set(title="accuracy", xlabel="step", ylim=(0, None))
    left.legend()
    for name, text in terms.items():
        right.plot(steps, [r[name] for r in progress], label=text)
    right.set(title="terms of the objective, without their weights", xlabel="step", ylim=(0, None))
    right.legend()
    rates = [r["learning_rate"] for r in progress]
    for step, *before, after in zip(steps[2:], rates, rates[1:], rates[2:], strict=False):
        if before[0] == before[1] > after:  # a drop, no slope
            for axes in (left, right):
                axes.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    return figure


def sharpness(metrics: Sequence[dict]) -> Figure:
    """How decided every indicator is over the steps, and how large its groups are at the end."""
    records = [r for r in metrics if "group_sizes" in r]
    names = list(records[-1]["group_sizes"])
    figure, ((left, right),) = _figure(1, 2, 10, 3.4, width_ratios=(3, 2))
    steps = [r["step"] for r in records]
    for name in names:
        style = {"linewidth": 2.5} if name in ("p1", "q1") else {"linewidth": 1}
        left.plot(steps, [r[f"sharpness/{name}"] for r in records], label=name, **style)
    left.axhline(0.95, color="0.7", linestyle=":", zorder=0)
    left.set(title="mean largest share of an indicator's columns", xlabel="step", ylim=(None, 1.02))
    left.legend(ncols=2, fontsize=8)
    for row, name in enumerate(names):
        sizes = np.array(records[-1]["group_sizes"][name])
        ends = np.cumsum(sizes) / sizes.sum()
        for number, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            share = size / sizes.sum()
            right.barh(row, share, left=end - share, color=group_colour(number), alpha=0.8)
            right.text(end - share / 2, row, size, ha="center", va="center", fontsize=8)
    right.set(title="features (classes: q1) in each group", yticks=range(len(names)), xticks=[])
    right.set_yticklabels(names)
    right.invert_yaxis()
    return figure


# ---------------------------------------------------------------- the groups


def superclasses(groups: Sequence[Sequence[int]], data: dict) -> Figure:
    """Where the classes of each superclass went (the paper's Figure 5)."""
    names, superclass_of = data["superclass_names"], np.array(data["superclass_of_class"])
    counts = np.array(
        [[np.sum(superclass_of[np.array(g)] == s) for g in groups] for s in range(len(names))]
    )
    order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
    # Five classes of a superclass have room for their names in one line, and many have none.
    most = counts.sum(axis=1).max()
    height, letters = (0.5, max(130 // most, 6)) if 5 < most <= ROOM else (0.26, 99)
    figure, ((axes,),) = _figure(1, 1, 10, 0.6 + height * len(names))
    left = np.zeros(len(names))
    for number in range(len(groups)):
        values = counts[order, number]
        axes.barh(
            range(len(names)), values, left=left, color=group_colour(number), alpha=0.85,
            label=f"group {number} ({len(groups[number])} classes)",
        )  # fmt: skip
        for row, superclass in enumerate(order):
            members = [c for c in groups[number] if superclass_of[c] == superclass]
            if most > ROOM:
                middle = left[row] + len(members) / 2
                axes.text(middle, row, len(members) or "", ha="center", va="center", fontsize=7)
                continue
            for place, c in enumerate(members):
                name = data["class_names"][c].replace("_", " ")
                name = textwrap.fill(name, letters, break_long_words=False, break_on_hyphens=False)
                axes.text(
                    left[row] + place + 0.5, row, name,
                    ha="center", va="center", fontsize=7,
                )  # fmt: skip
        left += values
    axes.set(yticks=range(len(names)), xticks=[], xlim=(0, most), ylim=(-0.6, len(names) - 0.4))
    axes.set_yticklabels([names[s].replace("_", " ") for s in order], fontsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=min(len(groups), 4))
    return figure


def confusion(matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> Figure:
    """Which classes are taken for which, the classes in the order of their groups."""
    order = np.concatenate([np.array(g, int) for g in groups])
    rates = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, ((axes,),) = _figure(1, 1, 5.6, 5)
    shown = axes.imshow(np.sqrt(rates[np.ix_(order, order)]), cmap="magma_r", vmin=0, vmax=1)
    for end in np.cumsum([len(g) for g in groups])[:-1]:
        axes.axhline(end - 0.5, color="0.3", linewidth=0.8)
        axes.axvline(end - 0.5, color="0.3", linewidth=0.8)
    axes.set(xlabel="predicted", ylabel="label", xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=axes, shrink=0.7)
    bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"])
    return figure


def samples(groups: Sequence[Sequence[int]], images, labels, data: dict, per_group=12) -> Figure:
    """One image of some classes of each group; images uint8 `[N, H, W, 3]`."""
    figure, axes = _figure(len(groups), per_group, 10, 1.15 * len(groups))
    for number, (group, row) in enumerate(zip(groups, axes, strict=True)):
        shown = _spread(group, min(len(group), per_group))
        for axis in row[len(shown) :]:
            axis.set_axis_off()
        for place, (axis, c) in enumerate(zip(row, shown, strict=False)):
            for first in np.flatnonzero(labels == c)[:1]:
                axis.imshow(images[first])
            name = textwrap.fill(data["class_names"][c].replace("_", " "), 16)
            axis.set_title(name, fontsize=6.5, pad=2)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=True, color=group_colour(number), linewidth=2.5)
            if place == 0:
                axis.set_ylabel(f"group {number}", fontsize=8)
    return figure


# ---------------------------------------------------------------- the weights


def weights(net: resnet.Dense, layers: int = 4) -> Figure:
    """Split layers' weights: as they lie, sorted by group, and after the cut (Figure 3)."""
    groups = grouping.merged_assignments(net.config, grouping.hard_assignments(net))
    inside = grouping.squares_inside(net)
    all_layers = list(zip(inside.items(), grouping.split_layers(net), strict=True))
    layers = min(layers, len(all_layers))
    chosen = [all_layers[i] for i in np.linspace(0, len(all_layers) - 1, layers).astype(int)]
    figure, axes = _figure(3, layers, 2.5 * layers, 7.6)
    for column, ((name, share), (kernel, inputs, outputs)) in enumerate(chosen):
        size = np.abs(kernel.numpy()).reshape(-1, *kernel.shape[-2:]).mean(axis=0)  # (D, K)
        rows, columns = (np.argsort(groups[name], kind="stable") for name in (inputs, outputs))
        same = groups[inputs][:, None] == groups[outputs]
        shown = [size, size[np.ix_(rows, columns)], (size * same)[np.ix_(rows, columns)]]
        titles = [name, f"{share:.2%} of squares inside", ""]
        for axis, picture, title in zip(axes[:, column], shown, titles, strict=True):
            axis.imshow(picture, cmap="Blues", vmin=0, vmax=np.quantile(size, 0.99), aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=8)
    for axis, label in zip(
        axes[:, 0], ("as they lie", "sorted by group", "after the cut"), strict=True
    ):
        axis.set_ylabel(label)
    return figure


# ---------------------------------------------------------------- the tree


def tree(net: resnet.Tree, data: dict, images=None, labels=None) -> Figure:
    """The tree, every box as wide as its FLOPs; below each leaf, test images and superclasses.

    docs/tree.png is report/tree.png of `python -m report pretrained/deep_2-2-2`.

    Args:
        images: uint8 `[N, H, W, 3]` with their labels `[N]`, or none.
    """
    # The axes' unit is an inch. Every leaf has a column; a branch, those of its leaves.
    branches = list(_with_leaves(net))
    column = max(10 / branches[0][2], 1.5)
    width = column * branches[0][2]
    figure = Figure(figsize=(width, 1), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width))
    axes.axis("off")
    text = "boxes are as wide as their FLOPs for one image; in all "
    text += ", ".join(_amounts(*resnet.count(net)))
    axes.text(width / 2, 0.2, text, ha="center", va="center", color="0.4")

    scale = 0.95 * min(column * leaves / branch.own_flops() for branch, _, leaves in branches)
    levels = sorted({branch.first_level for branch, _, _ in branches})
    top = {level: 0.4 + 0.94 * row for row, level in enumerate(levels)}
    bottom = top[levels[-1]] + 0.62
    boxes, lowest = {}, bottom
    for branch, first, leaves in branches:
        leaf = not branch.num_branches
        colour = group_colour(first) if leaf else "0.6"
        end = bottom if leaf else top[branch.branches[0].first_level] - 0.32
        boxes[branch] = _box(
            axes, branch, column * first, column * leaves, top[branch.first_level], end,
            scale * branch.own_flops(), colour,
        )  # fmt: skip
        if leaf:
            whole, parts, classes = contents(branch.classes, data)
            lists = (_fill("", whole, 0.95 * column), _fill("part of:", parts, 0.95 * column))
            text = "\n".join(filter(None, lists))
            left, y = column * (first + 0.025), bottom + 0.12
            if images is not None:
                y += _thumbnails(axes, left, y, 0.95 * column, images, labels, classes)
            title = f"group {first}: {len(classes)} class{'es' * (len(classes) > 1)}"
            axes.text(left, y, title, va="top", color=colour, weight="bold")
            text = axes.text(left, y + 0.18, text, va="top", linespacing=1.35)
            lowest = max(lowest, y + 0.18 + text.get_window_extent().height / figure.dpi)
    for branch in boxes:
        if branch.num_branches:
            _fork(axes, branch, boxes)
    axes.set_ylim(lowest + 0.1, 0)
    figure.set_size_inches(width, lowest + 0.1)
    return figure


def _with_leaves(branch: resnet.Branch, first: int = 0) -> Iterator[tuple]:
    """Branches from the trunk on, each with its first leaf's number and how many leaves it has."""
    yield branch, first, len(list(branch.leaves()))
    for child in branch.branches:
        yield from _with_leaves(child, first)
        first += len(list(child.leaves()))


def _box(axes, branch, left, columns, top, bottom, width, colour) -> Rectangle:
    """A branch's box in the middle of its columns; its label inside or, where narrow, beside."""
    names = branch.config.levels
    last = branch.last_level if branch.num_branches else len(names)
    stages = ", ".join(names[branch.first_level - 1 : last])
    text = "\n".join([stages, *_amounts(*branch.own_count())])
    center = left + columns / 2
    label = axes.text(center, (top + bottom) / 2, text, ha="center", va="center")
    beside = label.get_window_extent().width / axes.figure.dpi + 0.06
    if width < beside and width + beside < columns:
        center -= beside / 2
        label.set(x=center + width / 2 + 0.06, ha="left")
    box = Rectangle((center - width / 2, top), width, bottom - top)
    box.set(facecolor=(colour, 0.3), edgecolor=colour)
    return axes.add_patch(box)


def _fork(axes, branch: resnet.Branch, boxes: dict) -> None:
    """What flows from a box to those behind it, as wide as their shares of its channels."""
    (left, _), _, (right, bottom), _ = boxes[branch].get_corners()
    bounds = left + (right - left) * np.cumsum([0, *branch.fork_sizes]) / sum(branch.fork_sizes)
    for child, x0, x1 in zip(branch.branches, bounds, bounds[1:], strict=False):
        (x3, top), (x2, _) = boxes[child].get_corners()[:2]
        colour = boxes[child].get_edgecolor()
        axes.fill([x0, x1, x2, x3], [bottom, bottom, top, top], facecolor=colour, alpha=0.15)


def _amounts(weights: int, flops: int) -> tuple[str, str]:
    return EngFormatter("FLOPs", places=1)(flops), f"{weights:,} weights"


def contents(classes: np.ndarray, data: dict) -> tuple[list[str], list[str], np.ndarray]:
    """What a leaf tells apart: the superclasses that it has whole, or else its classes; of which
    others it has a part; and its classes in that order."""
    if not data["superclass_names"]:
        shown = _spread(classes, min(len(classes), MANY))
        names = [data["class_names"][c].replace("_", " ") for c in shown]
        more = [f"and {len(classes) - MANY} others"] if len(classes) > MANY else []
        return names + more, [], classes
    names = [name.replace("_", " ") for name in data["superclass_names"]]
    superclass_of = np.array(data["superclass_of_class"])
    sizes = np.bincount(superclass_of)
    counts = np.bincount(superclass_of[classes], minlength=len(sizes))
    order = np.lexsort((np.arange(len(sizes)), -counts, counts < sizes))
    whole = [names[s] for s in order if 0 < counts[s] == sizes[s]]
    parts = [f"{names[s]}{HARD}({counts[s]}/{sizes[s]})" for s in order if 0 < counts[s] < sizes[s]]
    place = np.argsort(order)[superclass_of[classes]]  # of each class's superclass
    return whole, parts, classes[np.argsort(place, kind="stable")]


def _fill(prefix: str, names: Sequence[str], width: float) -> str:
    """A list in lines of at most `width` inches, broken within a name only if that is longer."""

    def fits(text):
        points, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(), False)
        return points <= 72 * width

    lines = [prefix]
    for name in [f"{name}," for name in names[:-1]] + names[-1:]:
        for words in [name] if fits(name) else name.split(" "):
            longer = f"{lines[-1]} {words}".strip()
            lines[-1:] = [longer] if fits(longer) else [lines[-1], words]
    return "\n".join(lines) if names else ""


def _thumbnails(axes, left, top, width, images, labels, classes) -> float:
    """An image of at most 12 classes, in at most two rows; returns the height that they take."""
    per_row = int(np.clip(width / 0.39, 1, 6))
    size = min(width / per_row, 0.8)
    shown = _spread(classes, min(len(classes), 2 * per_row))
    for place, c in enumerate(shown):
        x, y = left + place % per_row * size, top + place // per_row * size
        extent = (x, x + 0.95 * size, y + 0.95 * size, y)
        for number in np.flatnonzero(labels == c)[:1]:
            axes.imshow(images[number], extent=extent, aspect="auto", interpolation="nearest")
    return -(-len(shown) // per_row) * size + 0.07


def _spread(classes: Sequence[int], number: int) -> np.ndarray:
    """Some of the classes, from the first to the last."""
    return np.array(classes)[np.linspace(0, len(classes) - 1, number).astype(int)]
