"""What a run is: its keys, what may not stand together, and what may change when it goes on."""
