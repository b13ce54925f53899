"""Measurements of drumline by drumline, on the real parts."""
