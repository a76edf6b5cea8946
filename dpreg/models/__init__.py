"""Models, losses and the optimizer from scratch."""
