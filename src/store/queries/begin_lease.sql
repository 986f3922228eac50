select pgcue.begin_lease($1, $2, make_interval(secs => $3), $4, $5)
