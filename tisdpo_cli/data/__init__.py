"""Reads datasets strictly, checks every row and tokenizes it. Knows no settings, no models and no engine."""
