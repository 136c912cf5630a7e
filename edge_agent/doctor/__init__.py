"""`duet doctor`: what is there, whether it fits together, and what `auto` will do with it."""
