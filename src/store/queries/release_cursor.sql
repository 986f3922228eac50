select pgcue.release_cursor($1, $2)::bigint
