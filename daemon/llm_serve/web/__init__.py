"""The HTTP edge: who may come in, what waits, and what operators can ask."""
