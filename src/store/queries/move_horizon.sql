select new_seen, new_writers from pgcue.move_horizon($1, $2)
