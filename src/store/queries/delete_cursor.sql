select null::bigint from pgcue.delete_cursor($1, $2)
