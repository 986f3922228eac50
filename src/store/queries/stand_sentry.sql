select pgcue.stand_sentry($1)
