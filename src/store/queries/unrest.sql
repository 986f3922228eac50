(select format('job %s of cursor %s is %s', id, cursor_key, state) from pgcue.all_jobs
  where cursor_key is not null and finished_at is null limit 10)
union all
(select format('cursor %s is %s', key, status) from pgcue.all_cursors where status in ('owned', 'held') limit 10)
