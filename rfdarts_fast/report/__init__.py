"""Runs made visible: cells, counts, histories and diagnostics, as text, figures and one HTML page."""
