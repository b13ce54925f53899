"""Tests of what processes say to each other and of the arithmetic that they share."""
