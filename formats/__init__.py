"""A network in the formats of other programs: what is exported, and how it is written and run."""
