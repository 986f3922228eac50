select id, queue, state::text, cursor_key, priority, nullif(expected_at, 'infinity'), run_at, started_at, attempt,
  max_attempts, payload, case json_typeof(payload) when 'object' then payload->>'key' end, cursor_snapshot, cursor_version,
  losses
from pgcue.finished_jobs
