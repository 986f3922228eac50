select pgcue.set_cursor_state($1, $2, $3::json)
