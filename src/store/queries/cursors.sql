select queue, key, status, state, version, owner, held_by, held_until, halted_at, halted_by, waiting, waiting_since
from pgcue.all_cursors
where queue = $1 and ($2::text is null or key = $2) and ($3::text is null or status = $3)
order by waiting desc, key limit $4
