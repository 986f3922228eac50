select null::bigint from pgcue.resume_cursor($1, $2)
