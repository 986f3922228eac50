select pgcue.leave_sentry($1)
