"""The synthetic data set's grouping is known: group.sh at the smoke preset has to find it.

In less time: a shallower network, smaller batches, and groups that form faster.
"""

import cifar100
import metrics
import rundir
import utils
from conftest import python, run_script


def test_two_groups_keep_superclasses_together(tmp_path):
    """At least 90 % of the pairs of one superclass (chance: 50 %), with sharp indicators."""
    data, run = str(tmp_path / "data"), tmp_path / "run"
    assert python("download_cifar100.py", "--dataset_path", data, "--synthetic").returncode == 0
    environment = {"PRESET": "smoke", "DATA_DIR": data, "TRAIN_DIR": str(run)}
    flags = ("--num_residual_units", 1, "--batch_size", 20, "--group_lr_scale", 30)
    run_script("group.sh", *flags, "--max_steps", 800, "--val_interval", 800, **environment)
    with rundir.Run(str(run)) as log:
        log.resume_metrics(800)
        last = [record for record in log.metrics if "group_sizes" in record][-1]
    sharp = {name: value for name, value in last.items() if name.startswith("sharpness/")}
    assert len(sharp) == 6 and min(sharp.values()) > 0.95
    groups = utils.read_json(run / "result.json")["group_classes"]
    superclasses = cifar100.describe(data)["superclass_of_class"]
    assert min(len(classes) for classes in groups) >= 30
    assert metrics.pairs_together(groups, superclasses) >= 0.9
