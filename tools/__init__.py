"""Programs for building and measuring the project; not part of the installed package."""
