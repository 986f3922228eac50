-- How long the jobs $1 to $2 waited and ran, and, if $3, what they answered themselves; in milliseconds.
select
  percentile_cont('{0.5, 0.95, 0.99, 1}'::float8[]) within group (
    order by extract(epoch from f.started_at - greatest(f.created_at, f.run_at))::float8 * 1000),
  percentile_cont('{0.5, 0.95, 0.99, 1}'::float8[]) within group (
    order by extract(epoch from f.finished_at - f.started_at)::float8 * 1000),
  percentile_cont('{0.5, 0.95, 0.99, 1}'::float8[]) within group (
    order by case when $3 then f.result::text::float8 / 1000 end)
from finished_jobs f
where f.id between $1 and $2
