"""Devices and processes: how they start, meet, and end together."""
