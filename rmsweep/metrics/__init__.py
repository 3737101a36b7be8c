"""Metrics: plain vectorised functions of scores and golden rewards."""
