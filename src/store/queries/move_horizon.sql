select new_seen, new_line_end, new_writers from pgcue.move_horizon($1, $2, $3)
