"""Rows: sources, their order, and their way to the devices."""
