"""Which expert copies stand where: what is measured, what is planned, and how a plan is carried out. No I/O."""
