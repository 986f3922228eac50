select pgcue.why($1)
