select id, queue, kind, state, payload, result, error, attempt, max_attempts, priority, expected_at,
  (extract(epoch from timeout) * 1000)::bigint as timeout_ms, headers, losses, cursor_key, cursor_snapshot,
  cursor_version, created_at, run_at, started_at, finished_at
from pgcue.all_jobs
where ($1::text is null or queue = $1) and ($2::text is null or kind = $2) and ($3::text is null or state = $3)
order by id desc limit $4
