select null::bigint from pgcue.halt_cursor($1, $2)
