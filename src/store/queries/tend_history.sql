select pgcue.tend_history($1)
