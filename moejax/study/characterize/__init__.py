"""The study's experiments on the machine at hand: plan, child processes, results (`moejax characterize`)."""
