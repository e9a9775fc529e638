"""What other software takes for a step: physics of its method, with few coefficients fitted to receipts of it."""
