"""The recipe, in the paper's order; each stage is a driver that reads as the algorithm."""
