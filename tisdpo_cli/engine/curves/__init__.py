"""The curves of one or several trainings, read from their outputs: as plain values, and as a page."""
