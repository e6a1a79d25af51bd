"""What a run costs, without running it; and what it does, measured."""
