"""What a compiled program costs, and where its time goes."""
