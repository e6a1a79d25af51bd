"""Arrays in, one float32 number per example out. No network, no config, no key."""
