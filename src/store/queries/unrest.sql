(select format('job %s is %s%s', id, state, ' (cursor ' || cursor_key || ')') from pgcue.all_jobs
  where finished_at is null limit 10)
union all
(select format('cursor %s is %s', key, status) from pgcue.all_cursors where status in ('owned', 'held') limit 10)
