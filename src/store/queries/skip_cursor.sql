select pgcue.skip_cursor($1, $2)
