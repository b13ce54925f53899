"""Experts over ranks: the exchange of tokens with the ranks that hold their experts."""
