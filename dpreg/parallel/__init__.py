"""Devices, the reduction over them, and the compiled steps."""
