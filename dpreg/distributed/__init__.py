"""Devices and processes: how they start, communicate, and end together."""
