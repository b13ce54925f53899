"""Tests of the engine's shells and of membership."""
