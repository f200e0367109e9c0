"""What `status` and `top` show, drawn in so many cells; nothing here writes to a terminal."""
