"""Pictures of what was learned; every function returns a matplotlib figure.

Colours: one for each group, and for a group of the classifier the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import grouping
import resnet
from utils import tf

matplotlib.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110,
    "axes.titlesize": 10, "legend.frameon": False,
})  # fmt: skip

TERMS = {"cross_entropy": "cross entropy", "overlap": "overlap $R_D$",
         "weight_split": "weight split $R_W$", "uniform": "uniform $R_E$"}  # fmt: skip


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
    for step, before, after in zip(steps[1:], rates, rates[1:], strict=False):
        if after < before:
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
    names, of = data["superclass_names"], np.array(data["superclass_of_class"])
    counts = np.array([[np.sum(of[np.array(g)] == s) for g in groups] for s in range(len(names))])
    order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
    figure, ((axes,),) = _figure(1, 1, 10, 0.6 + 0.26 * len(names))
    left = np.zeros(len(names))
    for number in range(len(groups)):
        values = counts[order, number]
        axes.barh(
            range(len(names)), values, left=left, color=group_colour(number), alpha=0.85,
            label=f"group {number} ({len(groups[number])} classes)",
        )  # fmt: skip
        for row, superclass in enumerate(order):
            members = [c for c in groups[number] if of[c] == superclass]
            for place, c in enumerate(members):
                axes.text(
                    left[row] + place + 0.5, row, data["class_names"][c].replace("_", " "),
                    ha="center", va="center", fontsize=7,
                )  # fmt: skip
        left += values
    axes.set(yticks=range(len(names)), xticks=[], xlim=(0, counts.sum(axis=1).max()))
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
    """One image of some classes of each group; images uint8 `[N, 32, 32, 3]`."""
    figure, axes = _figure(len(groups), per_group, 10, 1.15 * len(groups))
    for number, (group, row) in enumerate(zip(groups, axes, strict=True)):
        chosen = np.array(group)[np.linspace(0, len(group) - 1, per_group).astype(int)]
        for place, (axis, c) in enumerate(zip(row, chosen, strict=True)):
            axis.imshow(images[np.flatnonzero(labels == c)[0]])
            axis.set_title(data["class_names"][c].replace("_", " "), fontsize=6.5, pad=2)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=True, color=group_colour(number), linewidth=2.5)
            if place == 0:
                axis.set_ylabel(f"group {number}", fontsize=8)
    return figure


# ---------------------------------------------------------------- the weights


def weights(net: resnet.ResNet, layers: int = 4) -> Figure:
    """Split layers' weights: as they lie, sorted by group, and after the cut (Figure 3)."""
    groups = grouping.merged_assignments(net.config, grouping.hard_assignments(net))
    inside = grouping.squares_inside(net)
    all_layers = list(zip(inside.items(), grouping.split_layers(net), strict=True))
    layers = min(layers, len(all_layers))
    chosen = [all_layers[i] for i in np.linspace(0, len(all_layers) - 1, layers).astype(int)]
    figure, axes = _figure(3, layers, 2.5 * layers, 7.6)
    for column, ((name, share), (kernel, inputs, outputs)) in enumerate(chosen):
        size = (
            tf.reduce_mean(tf.abs(kernel), axis=(0, 1))
            if len(kernel.shape) == 4
            else tf.abs(kernel)
        )
        size = size.numpy()  # (D, K)
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


def tree(net: resnet.SplitResNet, data: dict, words: int = 6) -> Figure:
    """The tree: what each branch computes, its weights, FLOPs and classes."""
    leaves = list(net.leaves())
    figure, ((axes,),) = _figure(1, 1, 10, 2.2 + 0.9 * len(leaves))
    depth = _depth(net)
    number_of = {id(leaf): number for number, leaf in enumerate(leaves)}

    def draw(branch, level) -> float:
        children = [draw(b, level + 1) for b in branch.branches]
        y = float(np.mean(children)) if children else float(number_of[id(branch)])
        count = resnet.count(branch)[0] - sum(resnet.count(b)[0] for b in branch.branches)
        colour = group_colour(number_of[id(branch)]) if not children else "0.85"
        axes.add_patch(FancyBboxPatch(
            (level, y - 0.3), 0.72, 0.6, boxstyle="round,pad=0.02", facecolor=colour, alpha=0.35,
            edgecolor="0.4",
        ))  # fmt: skip
        lines = [_stages(branch), f"{count:,} weights", f"{branch.own_flops() / 1e6:,.1f} MFLOPs"]
        axes.text(level + 0.36, y, "\n".join(lines), ha="center", va="center", fontsize=8)
        for child in children:
            axes.plot([level + 0.74, level + 0.98], [y, child], color="0.5", linewidth=1.2)
        if not children:
            names = [data["class_names"][c].replace("_", " ") for c in branch.classes]
            text = ", ".join(names[:words]) + (" ..." if len(names) > words else "")
            axes.text(level + 0.8, y, f"{len(names)} classes: {text}", va="center", fontsize=8)
        return y

    draw(net, 0)
    axes.set(xlim=(-0.05, depth + 1.6), ylim=(len(leaves) - 0.45, -0.55))
    axes.axis("off")
    return figure


def _depth(branch: resnet.Branch) -> int:
    return 1 + max(map(_depth, branch.branches)) if branch.branches else 0


def _stages(branch: resnet.Branch) -> str:
    """The stages of a branch, such as `unit_3, logits`."""
    levels = [f"unit_{level}" for level in range(branch.first_level, branch.last_level + 1)]
    return ", ".join(levels + ([] if branch.num_branches else ["logits"]))
