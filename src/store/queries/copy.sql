copy pgcue.jobs (kind, payload, queue, priority, expected_at, run_at, max_attempts, timeout, cursor_key, headers,
  on_retry, on_failure)
from stdin
