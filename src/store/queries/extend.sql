select alive, open_claims, cancelled from pgcue.extend($1, make_interval(secs => $2))
