"""The student generates. Training and inference share this code."""
