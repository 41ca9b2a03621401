"""What was learned, as a page and in words.

    python -m report runs/cpu        a pipeline: group/ and split/ below it
    python -m report runs/baseline   a single run

writes report.html into that folder, one self-contained page, and its pictures into report/. The
words also need what eval.py wrote: split/eval, and group/eval and group/eval_mask, or the same of
the validation images (eval_val, eval_mask_val), which is what experiments/run.sh writes.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import cifar100
import grouping
import metrics
import resnet
import restore
import rundir
import utils
from report import figures

NAMES = ("grouped", "cut", "tree")
RESULTS = (  # their folders of eval.py: of the test images, or the first two of validation images
    ("group/eval", "group/eval_mask", "split/eval"),
    ("group/eval_val", "group/eval_mask_val", "split/eval"),
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; } p { max-width: 46rem; } pre { font-size: 0.8rem; white-space: pre-wrap; }
table { border-collapse: collapse; } td, th { padding: 0.2rem 0.9rem 0.2rem 0; text-align: left; }
.note { background: #fff3cd; padding: 0.5rem 0.8rem; }
"""


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The run's folder and its data; a mistake ends the program with one line."""
    parser = utils.FlagParser(__doc__, needed=("run",))
    parser.usage = "%(prog)s RUN --FLAG VALUE ..."
    add = parser.add_argument
    add("run", nargs="?", type=utils.path, help="a pipeline's folder or a run's")
    add("--data_dir", type=utils.path, default="data/cifar100", help="for names and images")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- words


def summary(results: dict[str, dict], data: dict) -> str:
    """One page of text from the three results of `read_results` and the data set's description."""
    grouped, cut, tree = (results[name] for name in NAMES)
    dense = NAMES[:2]
    as_learned = dense if tree["equal_groups"] else NAMES
    alike = [("dataset", NAMES), ("network", NAMES), ("groups", NAMES), ("split", dense),
             ("step", dense), ("group_classes", as_learned)]  # fmt: skip
    differing = [
        key for key, names in alike if any(results[n][key] != results[names[0]][key] for n in names)
    ]
    if differing or not cut["masked"] or grouped["masked"]:
        what = f" ({', '.join(differing)} differ)" if differing else ""
        raise ValueError(f"the results are not of one pipeline{what}: run eval.py again for each")
    note = " (SYNTHETIC images, not CIFAR-100)" if tree["dataset"] == "synthetic" else ""
    groups = tree["group_classes"]
    lines = [
        f"data set           {tree['dataset']}, {tree['num_examples']:,} {tree['split']} images"
        f"{note}",
        f"network            {tree['network']}, groups {tree['groups']}",
    ]
    before = f"grouped {grouped['accuracy']:.4f}, right after the cut {cut['accuracy']:.4f}"
    after = f"finetuned tree {tree['accuracy']:.4f}"
    if grouped["split"] == tree["split"]:
        lines.append(f"test accuracy      {before}, {after}")
    else:
        lines += [f"validation         {before}", f"test accuracy      {after}"]
    if "squares_inside" in grouped:
        sharp, inside = (min(grouped[name].values()) for name in ("sharpness", "squares_inside"))
        sharp, inside = math.floor(1e3 * sharp) / 1e3, math.floor(1e5 * inside) / 1e5  # "or more"
        lines += [
            f"before the cut     every indicator's mean largest share {sharp:.3f} or more,",
            f"                   {inside:.3%} or more of each split layer's squares inside groups",
        ]
    for name in ("weights", "flops"):
        saved = 1 - tree[name] / grouped[name]
        lines.append(f"{name:<19}{grouped[name]:,} -> {tree[name]:,}, {saved:.1%} saved")
    if "superclass_pairs" in tree:
        lines.append(
            f"superclasses       {tree['superclass_pairs']:.2f} of the pairs of classes of one "
            f"superclass are together (chance {tree['superclass_pairs_chance']:.2f})"
        )
    for number, classes in enumerate(groups):
        names = ", ".join(data["class_names"][c] for c in classes)
        if len(classes) > figures.MANY:
            whole, parts, _ = figures.contents(np.array(classes), data)
            lists = (", ".join(whole), f"part of: {', '.join(parts)}" if parts else "")
            names = "; ".join(filter(None, lists))
        title = f"group {number} ({len(classes)})"
        lines += textwrap.wrap(f"{title:<19}{names}", 100, subsequent_indent=" " * 19)
    return "\n".join(lines)


def read_results(run: str) -> dict[str, dict]:
    """The three results of a pipeline; that of the tree also says whether `equal_groups` cut it.

    Raises:
        ValueError: one is missing or damaged; says what makes it.
    """
    choices = [[os.path.join(run, f, "result.json") for f in folders] for folders in RESULTS]
    paths = max(choices, key=lambda paths: sum(map(os.path.exists, paths)))
    try:
        results = dict(zip(NAMES, map(utils.read_json, paths), strict=True))
        config = os.path.join(os.path.dirname(os.path.dirname(paths[2])), "config.json")
        flags = utils.read_json(config)["flags"] if os.path.exists(config) else {}
        results["tree"]["equal_groups"] = flags.get("equal_groups", False)
        return results
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing: run quickstart.sh, or eval.py with --checkpoint "
            "RUN/group, the same with --mask, and RUN/split"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}: run eval.py again") from None


# ---------------------------------------------------------------- the page


def read_network(run: str, data: dict, data_dir: str):
    """The network of a run's newest checkpoint; None if it has none.

    Raises:
        ValueError: the checkpoint is damaged, lacks a file, or is of another data set than the one
            in `data_dir`.
    """
    if not rundir.checkpoint_steps(run) and not rundir.half_checkpoints(run):
        return None
    path = rundir.find_checkpoint(run)
    net, description = restore.load_network(path)
    restore.check_dataset(path, description, data, data_dir, split="test")
    restore.check_images(path, net, data_dir)
    return net


def sections(run: str, data: dict, data_dir: str) -> Iterator[tuple[str, str, str, object]]:
    """(file name, title, what it shows, figure) of every picture that a run's files allow."""
    stages = [os.path.join(run, name) for name in ("group", "split")]
    stages = [stage for stage in stages if os.path.isdir(stage)] or [run]
    nets = [read_network(stage, data, data_dir) for stage in stages]
    tree = next((net for net in nets if isinstance(net, resnet.Tree)), None)
    if tree is not None:
        images, labels = cifar100.load(data_dir, "test")
        text = (
            "Each box is a branch with its own weights; below a leaf, test images of its classes, "
            "the superclasses that it holds whole and how much of the others."
        )
        if not data["superclass_names"]:
            text = "Each box is a branch with its own weights; below a leaf, its classes."
        yield "tree", "The tree", text, figures.tree(tree, data, images, labels)
    evaluated, older = None, ""
    for stage, net in zip(stages, nets, strict=True):
        name, records = os.path.basename(os.path.abspath(stage)), rundir.read_metrics(stage)
        if any("loss" in record for record in records):
            text = "Grey lines mark where the learning rate drops."
            yield f"{name}_curves", f"Learning: {name}", text, figures.learning_curves(records)
        if any("group_sizes" in record for record in records):
            text = (
                "1 is decided, 1 / groups is uniform. Before the cut all should be near 1, and the "
                "weights between groups gone."
            )
            yield "sharpness", "How the groups became sharp", text, figures.sharpness(records)
        if isinstance(net, resnet.Dense) and max(net.config.groups) > 1 and _can_be_cut(net):
            text = (
                "Mean size of the weights that join an input (row) and an output (column): as the "
                "layer has them, sorted by group, and after the cut (the paper's Figure 3)."
            )
            yield "weights", "Weights between and within groups", text, figures.weights(net)
        result = os.path.join(stage, "eval", "result.json")
        if os.path.exists(result):
            evaluated = utils.read_json(result)
            if missing := {"step", "group_classes", "confusion_matrix"} - evaluated.keys():
                raise ValueError(f"{result} lacks {', '.join(sorted(missing))}: run eval.py again")
            restore.check_dataset(result, evaluated, data, data_dir, split="test")
            step, newest = evaluated["step"], max(rundir.checkpoint_steps(stage), default=0)
            older = f" Of step {step:,}; by now there is {newest:,}: run eval.py again."
            older = older if step < newest else ""
    if tree is not None:
        yield from _group_sections(tree, data, images, labels)
    if evaluated:
        groups = [g for g in evaluated["group_classes"] if g]
        matrix = np.array(evaluated["confusion_matrix"])
        yield (
            "confusion",
            "Confusions",
            _confusions(matrix, groups) + older,
            figures.confusion(matrix, groups),
        )


def _can_be_cut(net: resnet.Dense) -> bool:
    try:
        return bool(grouping.hard_assignments(net))
    except ValueError:
        return False


def _group_sections(tree: resnet.Tree, data: dict, images, labels):
    groups = [classes.tolist() for classes in resnet.class_groups(tree)]
    if data["superclass_names"]:
        words = _agreement(groups, data["superclass_of_class"])
        figure = figures.superclasses(groups, data)
        yield "superclasses", "Groups and superclasses", words, figure
    text = "A test image of some classes of each group."
    yield "samples", "Classes of each group", text, figures.samples(groups, images, labels, data)


def _agreement(groups: Sequence[Sequence[int]], superclass_of: Sequence[int]) -> str:
    """How far groups agree with superclasses, beside chance."""
    if not metrics.has_pairs(superclass_of):
        return ""
    words = []
    for name, measure in [
        ("of the pairs of classes of one superclass are together", metrics.pairs_together),
        ("is the superclasses' purity (the largest share in one group)", metrics.purity),
    ]:
        mean, deviation = metrics.by_chance(measure, groups, superclass_of)
        value = measure(groups, superclass_of)
        words.append(
            f"{value:.2f} {name}; random groups of these sizes give {mean:.2f}, standard deviation "
            f"{deviation:.3f}"
            + (f": {(value - mean) / deviation:.1f} deviations above chance." if deviation else ".")
        )
    return " ".join(words)


def _confusions(matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> str:
    """How often what is wrong is at least in the right group."""
    inside, between = metrics.mistakes(matrix, groups)
    wrong = inside + between
    if len(groups) < 2:
        return f"{wrong:,} mistakes."
    chance = metrics.chance_together(groups)
    return (
        f"Of {wrong:,} mistakes {inside / max(wrong, 1):.0%} stay within the group; at random it "
        f"would be {chance:.0%}. Lines divide the groups."
    )


def write_page(run: str, title: str, words: str, found) -> str:
    """report.html with all pictures of `found` inside, and each of them as report/NAME.png."""
    folder = os.path.join(run, "report")
    with utils.writing(folder):
        os.makedirs(folder, exist_ok=True)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if "SYNTHETIC" in title:
        parts.append(
            '<p class="note">Drawn images, not photographs: results say nothing of CIFAR-100.</p>'
        )
    if words:
        parts.append(f"<pre>{html.escape(words)}</pre>")
    for name, heading, text, figure in found:
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        with utils.atomic_write(os.path.join(folder, f"{name}.png"), "wb") as file:
            file.write(picture.getvalue())
        encoded = base64.b64encode(picture.getvalue()).decode()
        parts.append(
            f"<h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>"
            f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{encoded}">'
        )
    path = os.path.join(run, "report.html")
    with utils.atomic_write(path) as file:
        file.write(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
            f"<body>{''.join(parts)}</body></html>\n"
        )
    return path


def main(argv: Sequence[str]) -> int:
    flags = parse_flags(argv)
    if not os.path.isdir(flags.run):
        raise ValueError(f"there is no run {flags.run}: name the folder of a run or a pipeline")
    if not os.access(flags.run, os.W_OK):
        raise ValueError(f"{flags.run} is read-only, and the report is written into it: copy it")
    data = cifar100.describe(flags.data_dir)
    words = ""
    if os.path.isdir(os.path.join(flags.run, "group")):
        try:
            words = summary(read_results(flags.run), data)
        except (ValueError, KeyError) as error:
            reason = f"a result lacks {error}: run eval.py again"
            words = f"No summary: {reason if isinstance(error, KeyError) else error}"
        print(words)
    note = {"synthetic": "SYNTHETIC data", "cifar100": "CIFAR-100"}.get(
        data["dataset"], data["dataset"]
    )
    title = f"SplitNet: {os.path.basename(os.path.abspath(flags.run))}, {note}"
    found = list(sections(flags.run, data, flags.data_dir))
    if not found:
        raise ValueError(f"{flags.run} holds no run: name the folder of a run or of a pipeline")
    path = write_page(flags.run, title, words, found)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    utils.run_main(main)
