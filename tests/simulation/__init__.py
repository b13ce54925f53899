"""The real core against simulated workers, a virtual clock and seeded disorder."""
