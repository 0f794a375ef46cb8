"""Every default, type, check and help text, once. Reads the registries of the method and nothing else."""
