select priority, mark, contended, id, tid, kind, payload, attempt, max_attempts, timeout_ms, headers, waited_ms,
  cursor_key, cursor_state, cursor_version
from pgcue.claim_lanes($1, $2, $3, $4, $5, $6, $7, $8)
