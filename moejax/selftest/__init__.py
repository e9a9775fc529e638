"""What a user can put a machine and an installation through: `moejax selftest`."""
