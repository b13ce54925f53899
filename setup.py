"""The list of packages, nested ones included; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = ("engine", "workers", "protocol")

setup(packages=[f"drumline.{name}" for root in ROOTS for name in (root, *(f"{root}.{p}" for p in find_packages(root)))])
