-- Jobs $2 to $3 of kind $1, of $4 cursors in turn, each with a payload of about $5 bytes that hardly compresses.
insert into :table (kind, payload, cursor_key)
select $1, p.payload, case when $4 > 0 then 'cursor ' || n % $4 end
from generate_series($2, $3) n
cross join lateral (
  select case when $5 <= 2 then '{}' else
    to_json(left((select string_agg(md5(n || ' ' || i), '') from generate_series(1, $5 / 32 + 1) i), $5 - 2)) end as payload
) p
order by n
