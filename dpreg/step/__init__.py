"""The compiled step: the algorithm, its reductions, and how it is compiled."""
