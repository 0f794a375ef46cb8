"""Datasets: read strictly, checked row by row, tokenised by one function. Knows no settings, model or engine."""
