select queue, state::text, count(*) as jobs from pgcue.finished_jobs
where finished_at > clock_timestamp() - interval '1 hour' group by 1, 2 order by 1, 2
