"""What watches a run: the display, the curve, the summary, the report, the saved state."""
