"""Every default, type, check and help text of the program, once. Knows nothing of torch, files or the terminal."""
