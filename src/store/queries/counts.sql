select j.queue,
  case when j.token is not null then 'running' when j.stage = 'suspect' then 'ready' else j.stage::text end as state,
  count(*) as jobs,
  extract(epoch from clock_timestamp() - min(greatest(j.run_at, j.created_at)))::float8 as oldest
from pgcue.jobs j group by 1, 2 order by 1, 2
