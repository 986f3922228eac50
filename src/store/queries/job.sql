select id, queue, kind, state, payload, result, error, attempt, max_attempts, priority, expected_at,
  (extract(epoch from timeout) * 1000)::bigint as timeout_ms, headers, losses, cursor_key, cursor_snapshot,
  cursor_version, created_at, run_at, started_at, finished_at
from pgcue.all_jobs where id = $1
