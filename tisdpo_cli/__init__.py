"""TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization, as a command line tool."""

__version__ = "0.1.0"
