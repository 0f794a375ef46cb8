"""What the commands do. Settings come in at the top of each module; nothing here writes to a terminal."""
