"""The keys of a run, which values contradict each other, and which may change when it resumes."""
