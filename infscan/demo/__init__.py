"""The embedded demo: a small corpus with planted facts, and the model trained on it. See README.md; data only."""
