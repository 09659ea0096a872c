"""The command line: `rlhf-ray` and its commands."""
