select l.id, l.node, l.started_at, l.seen_at, l.expires_at > clock_timestamp() and l.dead_at is null as alive,
  coalesce(sum(c.open), 0)::bigint as claimed
from pgcue.leases l left join pgcue.claims c on c.lease = l.id
group by l.id order by l.started_at
