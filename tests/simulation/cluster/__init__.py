"""A whole engine on a virtual clock: the real decisions of a coordinator, with ranks, supervisor, journal, clients."""
