"""Speed, in ratios: Table 5 of the paper, the training step, the pipeline, other frameworks."""
