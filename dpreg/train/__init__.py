"""Training: the trainer, its loop over compiled steps, and the callbacks between them."""
