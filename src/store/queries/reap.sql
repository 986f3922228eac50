select ended, moved, stuck from pgcue.reap()
