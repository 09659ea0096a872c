"""What a model is worth: against the testbed's truth, and by the reward models."""
