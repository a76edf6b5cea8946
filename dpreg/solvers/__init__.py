"""Exact solvers, over all shards and processes."""
