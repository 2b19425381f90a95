"""One training step of the user's module, re-run on jets, without side effects."""
