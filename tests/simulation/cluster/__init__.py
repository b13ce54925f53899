"""A whole engine on a virtual clock: the real coordinator's decisions, simulated ranks, supervisor, journal, clients."""
