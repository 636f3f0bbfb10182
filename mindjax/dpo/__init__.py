"""Direct Preference Optimization."""
