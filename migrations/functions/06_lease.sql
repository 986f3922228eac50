-- Leases: a node's right to run what it claimed, kept alive by one heartbeat and ended by the reaper.

create or replace function check_ttl(argument text, ttl interval) returns void
language plpgsql set search_path from current as $$
begin
  if (check_ttl.ttl > interval '0' and check_ttl.ttl <= interval '1000 years') is not true then
    perform refuse(check_ttl.argument, check_ttl.ttl::text, 'a time longer than zero, up to 1000 years');
  end if;
end $$;

create or replace function begin_lease(
  lease bigint, node text, ttl interval, queues text[] default null, kinds text[] default null
) returns void
language plpgsql set search_path from current as $$
begin
  perform refuse('lease', null, 'a random number that was never used') where begin_lease.lease is null;
  perform refuse('node', null, 'its name') where begin_lease.node is null;
  perform check_ttl('ttl', begin_lease.ttl);
  insert into leases (id, node, ttl, queues, kinds, expires_at)
  values (begin_lease.lease, begin_lease.node, begin_lease.ttl, begin_lease.queues, begin_lease.kinds,
    clock_timestamp() + begin_lease.ttl);
end $$;

-- The heartbeat; also for SQL consumers, whose lease is their claim's token. alive: the lease goes on,
-- for another ttl from now; a dead lease is never revived. Then its open claims, so that the node gives
-- back what it does not know of, and its running jobs that somebody wants cancelled.
create or replace function extend(
  lease bigint, ttl interval default '30 seconds', out alive boolean, out open_claims bigint[], out cancelled bigint[]
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
begin
  perform check_ttl('ttl', extend.ttl);
  update leases l set seen_at = clock_timestamp(), ttl = extend.ttl, expires_at = clock_timestamp() + extend.ttl
    where l.id = extend.lease and l.dead_at is null;
  alive := found;
  open_claims := array(select c.token from claims c where c.lease = extend.lease);
  cancelled := array(select j.id from jobs j where j.cancelled_at is not null and j.token = any(open_claims));
end $$;

-- Give back what is left of a claim: 'release' by its node, 'lost' by the reaper, or only the run of one
-- cursor. Cursors first, then jobs; what another transaction holds is left for the next time, and with a
-- job its whole run, because a run is settled whole.
create or replace function give_back(token bigint, outcome text, key text default null, out moved int, out stuck int)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  free record;
begin
  perform require_read_committed();
  if give_back.outcome in ('release', 'lost') is not true then
    perform refuse('outcome', give_back.outcome, 'release or lost');
  end if;
  with mine as materialized (
    select j.id, j.queue, j.cursor_key as key from claims c join jobs j on j.id = any(c.ids) and j.token = c.token
    where c.token = give_back.token and (give_back.key is null or j.cursor_key = give_back.key)
  ), cursors_locked as materialized (
    select k.queue, k.key, c.version
    from (select distinct m.queue, m.key from mine m where m.key is not null order by m.queue, m.key) k
    cross join lateral (
      select c.ctid as tid from cursors c where c.queue = k.queue and c.key = k.key order by c.turn desc limit 1
    ) newest
    cross join lateral (select c.version from cursors c where c.ctid = newest.tid for update skip locked) c
  ), jobs_locked as materialized (
    select j.id, j.ctid as tid, j.queue, j.cursor_key as key from jobs j
    where j.token = give_back.token and j.id = any(array(select m.id from mine m))
    order by j.id for update skip locked
  ), whole as (
    select l.queue, l.key, l.version from cursors_locked l
    where (l.queue, l.key) not in (select m.queue, m.key from mine m where m.key is not null
      and m.id not in (select j.id from jobs_locked j))
  ), given as (
    select j.id, j.tid from jobs_locked j
    where j.key is null or (j.queue, j.key) in (select w.queue, w.key from whole w)
  )
  select coalesce((select array_agg(f.id) from given f), '{}') as ids, (select array_agg(f.tid) from given f) as tids,
      (select count(*) from mine)::int as all_of_it,
      (select array_agg(w.queue order by w.queue, w.key) from whole w) as queues,
      (select array_agg(w.key order by w.queue, w.key) from whole w) as keys,
      (select array_agg(w.version order by w.queue, w.key) from whole w) as versions
    into free;
  moved := cardinality(free.ids);
  stuck := free.all_of_it - moved;
  if moved > 0 then
    perform settle(free.tids, free.ids, array_fill(give_back.token, array[moved]),
      array_fill(give_back.outcome, array[moved]), null, null, null, null, null, null,
      free.queues, free.keys, array_fill(give_back.token, array[coalesce(cardinality(free.keys), 0)]),
      free.versions, free.versions, null, null, array_fill(false, array[coalesce(cardinality(free.keys), 0)]));
  end if;
  if stuck = 0 and give_back.key is null then
    -- Not one that was committed only now, and none of whose jobs was seen.
    delete from claims c where c.token = give_back.token
      and not exists (select from jobs j where j.id = any(c.ids) and j.token = c.token);
  end if;
end $$;

-- A node leaves: everything it still holds goes back, then its lease ends. The lease is marked dead first, as by
-- the reaper: a claim in flight, whose answer the node gave up, ends before or finds no lease.
create or replace function end_lease(lease bigint) returns int
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  moved int;
begin
  perform require_read_committed();
  perform from leases l where l.id = end_lease.lease for update; -- an update alone would not wait for claims
  update leases l set dead_at = coalesce(l.dead_at, clock_timestamp()) where l.id = end_lease.lease;
  moved := coalesce((select sum((give_back(c.token, 'release')).moved) from claims c where c.lease = end_lease.lease), 0);
  delete from leases l where l.id = end_lease.lease
    and not exists (select from claims c where c.lease = end_lease.lease);
  return moved;
end $$;

-- One pass of the reaper. It ends a lease if and only if its time ran out on the database's clock, and
-- the server has been up for a lease period (after an outage nodes need the time to extend). It marks
-- the lease dead before it touches jobs; jobs that are locked stay claimed until a later pass.
create or replace function reap(out ended int, out moved int, out stuck int)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cutoff timestamptz := clock_timestamp();
  dead bigint;
  back record;
  c record;
begin
  perform require_read_committed();
  ended := 0; moved := 0; stuck := 0;
  for dead in
    select l.id from leases l
    where l.dead_at is not null or l.expires_at < cutoff and pg_postmaster_start_time() + l.ttl < cutoff
    for update skip locked
  loop
    update leases l set dead_at = cutoff where l.id = dead and l.dead_at is null;
    for c in select k.token from claims k where k.lease = dead loop
      back := give_back(c.token, 'lost');
      moved := moved + back.moved;
      stuck := stuck + back.stuck;
    end loop;
    delete from leases l where l.id = dead and not exists (select from claims k where k.lease = dead);
    ended := ended + found::int;
  end loop;
end $$;
