select id, collapsed from pgcue.collapse($1, $2, $3, $4, $5,
  coalesce($6, clock_timestamp() + make_interval(secs => $7)), $8, make_interval(secs => $9), $10, $11,
  $12::text::pgcue.on_retry, $13::text::pgcue.on_failure, $14, $15)
