-- The least that the same durable transitions cost: in line order, in batches of :batch, rows are claimed in one
-- transaction and finished in another. One session on the server, without a client, without leases, without any
-- of the promises.
do $$
declare
  last bigint := 0;
  tids tid[];
begin
  loop
    with head as materialized (
      select j.ctid as tid, j.pos from bare_jobs j
      where j.queue = 'default' and j.priority = 0 and j.stage = 'ready' and j.expected_at = 'infinity' and j.pos > last
      order by j.pos limit :batch
    )
    select array_agg(h.tid), max(h.pos) into tids, last from head h;
    exit when tids is null;
    with claimed as (
      update bare_jobs j set token = 1, attempt = j.attempt + 1, started_at = clock_timestamp()
      from unnest(tids) t(tid) where j.ctid = t.tid
      returning j.ctid as tid
    )
    select array_agg(c.tid) into tids from claimed c;
    commit;
    :finish;
    commit;
  end loop;
end $$
