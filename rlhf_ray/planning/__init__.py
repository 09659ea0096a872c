"""Where roles fit on GPUs, and the settings that put them there."""
