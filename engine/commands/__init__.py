"""The commands of ``drumline``, one module each."""
