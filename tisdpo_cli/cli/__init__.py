"""The command line: thin and lazy. It knows no tensors, and imports nothing heavy before a command runs."""
