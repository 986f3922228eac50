select pgcue.end_lease($1)
