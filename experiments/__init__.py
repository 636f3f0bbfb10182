"""One file per experiment: `get_config(size)` returns a locked `ConfigDict`; recipes, no logic."""
