"""Training: the loop over compiled steps, and what goes on between them."""
