"""The planner: compiles a real training step for machines that are not there, and says what it will cost."""
