"""Where the recipe runs: Ray sessions, placement and groups of worker ranks. Knows nothing of RL or torch."""
