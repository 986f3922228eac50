select id, queue, cursor_key, state = 'completed', priority, nullif(expected_at, 'infinity'), attempt, payload,
  cursor_snapshot, cursor_version
from pgcue.finished_jobs where cursor_key is not null
