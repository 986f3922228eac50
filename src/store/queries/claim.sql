select priority, mark, contended, at_end, in_order, id, tid, kind, payload, attempt, max_attempts, timeout_ms, headers, waited_ms,
  lets_pass, halts, cursor_key, cursor_state, cursor_version, cursor_turn
from pgcue.claim_lanes($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
