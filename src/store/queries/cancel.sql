select pgcue.cancel($1)
