"""Who holds what of a model: the data, and its tables, pictures and sentences."""
