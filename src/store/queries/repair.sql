select pgcue.repair($1, $2, $3, $4, $5)
