"""One network on several devices: a tree's branches, training, workers on other machines."""
