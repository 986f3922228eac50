-- $1 cursors that are halted, as an operator halts them.
with keys as (
  insert into cursor_keys (queue, key) select 'default', 'halted ' || n from generate_series(0, $1 - 1) n
  returning queue, key
)
insert into cursors (queue, key, halted_at) select queue, key, clock_timestamp() from keys
