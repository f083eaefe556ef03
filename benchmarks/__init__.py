"""Measurements: scripts to run by hand; what they wrote lies in results/."""
