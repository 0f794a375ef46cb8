"""Files written by inspect-weights: a self-contained HTML report and a CSV table."""
