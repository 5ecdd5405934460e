"""The parts of allocation: the table that a plan is, the solver, and what is measured; see `converter.allocate`."""
