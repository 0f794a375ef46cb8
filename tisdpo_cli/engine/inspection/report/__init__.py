"""What inspect-weights writes to files: a page that stands alone, and a table."""
