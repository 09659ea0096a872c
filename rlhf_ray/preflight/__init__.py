"""What can be wrong with a run and be seen without running it."""
