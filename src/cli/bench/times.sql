-- How long jobs waited and ran, and, if $3, what they answered themselves; in milliseconds, a row a group.
select
  :group,
  percentile_cont('{0.5, 0.95, 0.99, 1}'::float8[]) within group (
    order by extract(epoch from f.started_at - greatest(f.created_at, f.run_at))::float8 * 1000),
  percentile_cont('{0.5, 0.95, 0.99, 1}'::float8[]) within group (
    order by extract(epoch from f.finished_at - f.started_at)::float8 * 1000),
  percentile_cont('{0.5, 0.95, 0.99, 1}'::float8[]) within group (
    order by case when $3 then f.result::text::float8 / 1000 end)
from finished_jobs f
where :which
group by 1
