select promoted, due_in_ms from pgcue.promote($1)
