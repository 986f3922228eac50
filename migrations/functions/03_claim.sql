-- Taking jobs out of the line under a lease. Plans are pinned: statistics of a queue are always stale.

-- Under repeatable read a settle cannot see what was parked meanwhile, and strands the cursor.
create or replace function require_read_committed() returns void
language plpgsql set search_path from current as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'pgcue: this call needs isolation level read committed, not %',
      current_setting('transaction_isolation')
      using errcode = 'invalid_transaction_state',
        hint = 'Begin the transaction with ISOLATION LEVEL READ COMMITTED. Enqueueing works in any.';
  end if;
end $$;

-- Candidates of a claim, without locking any: the first max_jobs claimable rows of the queue's lanes,
-- by falling priority, each lane read from its mark on. Dated rows (expected_at) have no mark.
-- A suspect (a job that lost its node) is a claim of its own, before all others: suspects are few and
-- had reached the head of the line once. One that was lost twice waits until the lease holds no other.
create or replace function read_line(
  lease bigint, queue text, kinds text[], max_jobs int, cutoff timestamptz,
  inout lanes smallint[], inout marks bigint[],
  out tids tid[], out keys text[], out at_lane smallint[], out at_pos bigint[], out suspect smallint,
  out took_ms float8
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  company smallint := coalesce((select max(c.losses) from claims c where c.lease = read_line.lease), 0);
  line_end bigint := (select last_value from line); -- read first: every pos above it is new to the scans
  lane smallint;
  mark bigint;
  seen record;
  new_lanes smallint[] := '{}';
  new_marks bigint[] := '{}';
begin
  select array[j.ctid], array[j.cursor_key], array[j.priority], array[j.pos], j.losses
    into tids, keys, at_lane, at_pos, suspect
    from jobs j
    where j.queue = read_line.queue and j.stage = 'suspect' and j.token is null
      and (read_line.kinds is null or j.kind = any(read_line.kinds)) and (company = 0 or company = 1 and j.losses = 1)
    order by j.priority desc, j.pos limit 1;
  if found then
    lanes := null; marks := null; -- no lane was read
    return;
  end if;

  suspect := 0; tids := '{}'; keys := '{}'; at_lane := '{}'; at_pos := '{}';
  for lane in
    select distinct l.priority from lanes l where l.queue = read_line.queue order by l.priority desc
  loop
    exit when cardinality(tids) >= read_line.max_jobs;
    mark := coalesce(read_line.marks[array_position(read_line.lanes, lane)], 0);
    select array_agg(s.tid) as tids, array_agg(s.cursor_key) as keys, array_agg(s.pos) as pos, count(*)::int as n
      into seen
      from (
        (select j.ctid as tid, j.cursor_key, null::bigint as pos from jobs j
          where j.queue = read_line.queue and j.priority = lane and j.stage = 'ready'
            and j.expected_at < 'infinity'
            and j.token is null and j.run_at <= cutoff and (read_line.kinds is null or j.kind = any(read_line.kinds))
          order by j.expected_at, j.pos limit read_line.max_jobs)
        union all
        (select j.ctid, j.cursor_key, j.pos from jobs j
          where j.queue = read_line.queue and j.priority = lane and j.stage = 'ready'
            and j.expected_at = 'infinity' and j.pos > mark
            and j.token is null and j.run_at <= cutoff and (read_line.kinds is null or j.kind = any(read_line.kinds))
          order by j.pos limit read_line.max_jobs)
        limit read_line.max_jobs - cardinality(tids)
      ) s;
    new_lanes := new_lanes || lane;
    if seen.n < read_line.max_jobs - cardinality(tids) then
      new_marks := new_marks || line_end;
    else
      new_marks := new_marks || coalesce(seen.pos[seen.n], mark);
    end if;
    if seen.n > 0 then
      tids := tids || seen.tids;
      keys := keys || seen.keys;
      at_lane := at_lane || array_fill(lane, array[seen.n]);
      at_pos := at_pos || seen.pos;
    end if;
  end loop;
  lanes := new_lanes;
  marks := new_marks;
  took_ms := extract(epoch from clock_timestamp() - cutoff) * 1000;
end $$;

-- Claim up to max_jobs jobs of one queue for a living lease. The token is drawn by the caller, so that
-- a lost reply can be resolved by it. First a row for each lane that was read, with no id: where the
-- next claim goes on reading it (a hint; without marks a lane is read from its start), whether rows
-- were seen that another transaction held (look again soon), and in waited_ms how long all the reading
-- took. Then a row for each job, in the order in which they should start; the jobs of one cursor stand
-- together and are one run.
create or replace function claim_lanes(
  lease bigint, token bigint, queue text, kinds text[], max_jobs int, run_length int,
  lanes smallint[], marks bigint[]
) returns table (
  priority smallint, mark bigint, contended boolean,
  id bigint, tid tid, kind text, payload json, attempt smallint, max_attempts smallint, timeout_ms bigint,
  headers json, waited_ms float8, cursor_key text, cursor_state json, cursor_version bigint
)
language plpgsql set search_path from current
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
as $$
#variable_conflict use_column
declare
  cutoff timestamptz := clock_timestamp();
  line record;
  runs record;
  chosen tid[];
  contended boolean := false;
  ids bigint[];
  line_lanes smallint[];
  line_marks bigint[];
begin
  perform require_read_committed();
  -- The lease first: the reaper locks it before it touches jobs, so no claim ends leased to nobody.
  perform from leases l
    where l.id = claim_lanes.lease and l.dead_at is null and l.expires_at > cutoff for key share;
  if not found then
    raise exception 'pgcue: lease % has ended', claim_lanes.lease using errcode = 'PQ001';
  end if;
  if exists (select from queues q where q.name = claim_lanes.queue and q.paused_at is not null) then
    return;
  end if;

  line_lanes := claim_lanes.lanes;
  line_marks := claim_lanes.marks;
  for again in 1 .. 50 loop
    line := read_line(claim_lanes.lease, claim_lanes.queue, claim_lanes.kinds, claim_lanes.max_jobs, cutoff,
      line_lanes, line_marks);
    -- Plain rows are locked only now: another claimer may have been faster. The nested loops over unnest,
    -- here and below, keep the order of the line.
    with locked as materialized (
      select j.ctid as tid, j.id
      from unnest(line.tids, line.keys) c(tid, key) join jobs j on j.ctid = c.tid
      where c.key is null and j.token is null and j.stage in ('ready', 'suspect')
      for update of j skip locked
    )
    select coalesce(array_agg(l.tid), '{}'), array_agg(l.id) into chosen, ids from locked l;
    contended := cardinality(chosen) < cardinality(array_positions(line.keys, null));

    select null::tid[] as tids, null::bigint[] as ids, null::text[] as no_room into runs;
    exit when cardinality(array_remove(line.keys, null)) = 0;
    runs := own_cursors(claim_lanes.token, claim_lanes.queue, claim_lanes.kinds, cutoff, line.tids, line.keys,
      line.suspect > 0, claim_lanes.max_jobs - cardinality(chosen),
      case when line.suspect > 0 then 1 else claim_lanes.run_length end);
    contended := contended or runs.contended;
    chosen := chosen || runs.tids;
    ids := ids || runs.ids;
    -- All that was met belongs to busy cursors and is parked now: others may stand behind.
    exit when cardinality(chosen) > 0 or runs.parked = 0;
    contended := true;
    line_lanes := line.lanes;
    line_marks := line.marks;
  end loop;

  return query
    select l.lane, least(l.mark, (
        -- A free cursor that found no room: its lane's mark must not pass it.
        select min(c.pos) - 1 from unnest(line.keys, line.at_lane, line.at_pos) c(key, lane, pos)
        where c.key = any(runs.no_room) and c.lane = l.lane)),
      contended, null::bigint, null::tid, null::text, null::json, null::smallint, null::smallint, null::bigint,
      null::json, line.took_ms, null::text, null::json, null::bigint
    -- A claim of a suspect reads no lane, and has one row to say if it was contended.
    from unnest(coalesce(line.lanes, array[null::smallint]), coalesce(line.marks, array[null::bigint])) l(lane, mark);
  if cardinality(chosen) = 0 then
    return;
  end if;
  insert into claims (token, lease, queue, ids, open, losses, has_cursors)
    values (claim_lanes.token, claim_lanes.lease, claim_lanes.queue, ids, cardinality(ids), line.suspect,
      runs.tids is not null);
  return query
    update jobs j set token = claim_lanes.token, attempt = attempt + 1, started_at = cutoff
    from unnest(chosen) t(tid)
    where j.ctid = t.tid
    returning j.priority, null::bigint, null::boolean, j.id, j.ctid, j.kind, j.payload, j.attempt, j.max_attempts,
      (extract(epoch from j.timeout) * 1000)::bigint, j.headers,
      (extract(epoch from cutoff - greatest(j.run_at, j.created_at)) * 1000)::float8, j.cursor_key,
      case when j.cursor_key is not null then
        (select c.state from cursors c where c.queue = j.queue and c.key = j.cursor_key) end,
      case when j.cursor_key is not null then
        (select c.version from cursors c where c.queue = j.queue and c.key = j.cursor_key) end;
end $$;

-- For SQL consumers: claim up to max_jobs jobs under a lease of their own, which is also their token.
-- Settle each with settle_one(id, token, ...) before the lease ends, or extend it.
create or replace function claim(
  queue text default 'default', max_jobs int default 1, kinds text[] default null,
  lease_for interval default '30 seconds'
) returns table (
  token bigint, id bigint, kind text, payload json, attempt smallint, max_attempts smallint,
  headers json, cursor_key text, cursor_state json
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  lease bigint := new_token();
begin
  perform begin_lease(lease, current_setting('application_name'), claim.lease_for);
  return query
    select lease, g.id, g.kind, g.payload, g.attempt, g.max_attempts, g.headers, g.cursor_key, g.cursor_state
    from claim_lanes(lease, lease, claim.queue, claim.kinds, claim.max_jobs, 1, '{}', '{}') g
    where g.id is not null;
  if not found then
    delete from leases l where l.id = lease;
  end if;
end $$;

create or replace function new_token() returns bigint
language sql volatile set search_path from current as $$
  select ('x' || substr(replace(gen_random_uuid()::text, '-', ''), 17))::bit(64)::bigint
$$;
