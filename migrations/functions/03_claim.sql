-- Taking jobs out of the line under a lease.
--
-- Functions here and in 05_settle.sql that have no `set search_path` are called by such that have it: to set it once
-- more takes longer than some of what they do.

-- Under repeatable read a settle cannot see what was parked meanwhile, and strands the cursor.
create or replace function require_read_committed() returns void
language plpgsql as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'pgcue: this call needs isolation level read committed, not %',
      current_setting('transaction_isolation')
      using errcode = 'PQ002',
        hint = 'Begin the transaction with ISOLATION LEVEL READ COMMITTED. Enqueueing works in any.';
  end if;
end $$;

-- Raise the floors of all lanes that nodes serve: what was in the line when it ended at line_end is committed by now, or
-- never will be. Whoever is first does it; the others do not wait. It walks over dead entries once, so that claims need not.
create or replace function raise_floors(line_end bigint) returns void
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  leap constant int := 100000;
  lane record;
  raised bigint;
begin
  update floors f set pos = 0 where f.pos > (select last_value from line); -- a server whose sequences were left behind
  insert into floors (queue, priority)
    select s.queue, n.priority
    from (select distinct unnest(l.queues) as queue from leases l) s
    cross join lateral (select 0::smallint as priority union select k.priority from lanes k where k.queue = s.queue) n
    where not exists (select from floors f where f.queue = s.queue and f.priority = n.priority)
    on conflict do nothing;
  for lane in
    select f.ctid as tid, f.* from floors f where f.pos + leap < raise_floors.line_end for update skip locked
  loop
    raised := least(raise_floors.line_end, (
      select j.pos - 1 from jobs j
      where j.queue = lane.queue and j.priority = lane.priority and j.stage = 'ready' and j.expected_at = 'infinity'
        and j.pos > lane.pos
      order by j.pos limit 1));
    update floors f set pos = raised where f.ctid = lane.tid and f.pos + leap / 2 < raised;
  end loop;
end $$;

-- Candidates of a claim, without locking any: the first max_jobs claimable rows of all_lanes (by falling priority), each
-- read from its mark on, and at least from its floor. Dated rows (expected_at) have neither. Every pos above line_end is
-- new to these scans. at_end: nothing stands behind these candidates.
-- A suspect (a job that lost its node) is a claim of its own, before all others: suspects are few and
-- had reached the head of the line once. One that was lost twice waits until the lease holds no other.
create or replace function read_line(
  lease bigint, queue text, kinds text[], max_jobs int, cutoff timestamptz,
  all_lanes smallint[], floors bigint[], line_end bigint, suspects boolean, inout lanes smallint[], inout marks bigint[],
  out tids tid[], out keys text[], out at_lane smallint[], out at_pos bigint[], out suspect smallint,
  out took_ms float8, out at_end boolean
)
language plpgsql as $$
#variable_conflict use_column
declare
  lane smallint;
  mark bigint;
  seen record;
  new_lanes smallint[] := '{}';
  new_marks bigint[] := '{}';
begin
  if suspects then
    select array[j.ctid], array[j.cursor_key], array[j.priority], array[j.pos], j.losses
      into tids, keys, at_lane, at_pos, suspect
      from jobs j
      where j.queue = read_line.queue and j.stage = 'suspect' and j.token is null
        and (read_line.kinds is null or j.kind = any(read_line.kinds))
        and case (select max(c.losses) from claims c where c.lease = read_line.lease)
          when 2 then false when 1 then j.losses = 1 else true end
      order by j.priority desc, j.pos limit 1;
    if found then
      lanes := null; marks := null; -- no lane was read
      return;
    end if;
  end if;

  suspect := 0; tids := '{}'; keys := '{}'; at_lane := '{}'; at_pos := '{}'; at_end := true;
  for n in 1 .. cardinality(all_lanes) loop
    if cardinality(tids) >= read_line.max_jobs then
      at_end := false;
      exit;
    end if;
    lane := all_lanes[n];
    mark := greatest(read_line.marks[array_position(read_line.lanes, lane)], floors[n]);
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
      at_end := false;
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
-- a lost reply can be resolved by it. Three sorts of rows come back. First, with no id and no cursor_key,
-- a row for each lane that was read: where the next claim goes on reading it (a hint; without marks a
-- lane is read from its start), whether rows were seen that another transaction held (look again soon), whether
-- nothing stands behind, in waited_ms how long all the reading took, and in in_order (of the first) the ids of the jobs
-- as they should start. Then, with no id, each cursor that is owned now. Then the jobs, page by page.
-- In order, those of one cursor stand together and are one run of up to run_length jobs, or up to longest_run when few
-- cursors share the claim. Of the rows of busy cursors that stand in the way, to_park are parked; the rest is read
-- past. A payload of more than max_inline bytes comes as null, to be asked for when the job starts: what waits in a
-- node's memory stays small.
create or replace function claim_lanes(
  lease bigint, token bigint, queue text, kinds text[], max_jobs int, run_length int,
  lanes smallint[], marks bigint[], longest_run int default null, to_park int default 1000,
  max_inline int default null
) returns table (
  priority smallint, mark bigint, contended boolean, at_end boolean, in_order bigint[],
  id bigint, tid tid, kind text, payload json, attempt smallint, max_attempts smallint, timeout_ms bigint,
  headers json, waited_ms float8, lets_pass boolean, halts boolean,
  cursor_key text, cursor_state json, cursor_version bigint, cursor_turn bigint
)
language plpgsql set search_path from current as $$
#variable_conflict use_column
declare
  cutoff timestamptz := clock_timestamp();
  paused boolean;
  suspects boolean;
  all_lanes smallint[];
  floors bigint[];
  line_end bigint;
  line record;
  runs record;
  owned text[];
  left_at int;
  chosen tid[];
  ids bigint[];
  line_lanes smallint[];
  line_marks bigint[];
  seen tid[];
  may_park int := claim_lanes.to_park;
  reads int; -- so often it reads past busy cursors
begin
  -- A statement costs about as much as a job: all that can be is asked in one, and what is wrong only if something is.
  if not (current_setting('transaction_isolation') = 'read committed' and claim_lanes.token is not null
      and claim_lanes.queue is not null and coalesce(claim_lanes.max_jobs, 0) > 0
      and coalesce(claim_lanes.run_length, 0) > 0) then
    perform require_read_committed();
    perform refuse('token', null, 'a random number that was never used') where claim_lanes.token is null;
    perform refuse('queue', null, 'its name') where claim_lanes.queue is null;
    perform refuse('max_jobs', claim_lanes.max_jobs::text, '1 or more') where claim_lanes.max_jobs > 0 is not true;
    perform refuse('run_length', claim_lanes.run_length::text, '1 or more');
  end if;
  reads := greatest(10, 1000 / claim_lanes.max_jobs);
  -- The lease first: the reaper locks it before it touches jobs, so no claim ends leased to nobody.
  select exists (select from queues q where q.name = claim_lanes.queue and q.paused_at is not null),
      exists (select from jobs j where j.queue = claim_lanes.queue and j.stage = 'suspect'),
      n.lanes, n.floors, (select last_value from line)
    into paused, suspects, all_lanes, floors, line_end
    from leases l cross join (
      select array_agg(n.priority order by n.priority desc) as lanes,
        array_agg(coalesce(f.pos, 0) order by n.priority desc) as floors
      from (select k.priority from lanes k where k.queue = claim_lanes.queue union select 0::smallint) n
      left join floors f on f.queue = claim_lanes.queue and f.priority = n.priority
    ) n
    where l.id = claim_lanes.lease and l.dead_at is null and l.expires_at > cutoff for key share of l;
  if not found then
    raise exception 'pgcue: lease % has ended', claim_lanes.lease using errcode = 'PQ001';
  end if;
  if paused then
    return;
  end if;

  line_lanes := claim_lanes.lanes;
  line_marks := claim_lanes.marks;
  contended := false;
  for again in 1 .. reads loop
    line := read_line(claim_lanes.lease, claim_lanes.queue, claim_lanes.kinds, claim_lanes.max_jobs, cutoff,
      all_lanes, floors, line_end, suspects, line_lanes, line_marks);
    chosen := '{}';
    exit when line.tids = '{}';
    -- Plain rows are locked only now: another claimer may have been faster.
    select coalesce(array_agg(l.tid), '{}'), array_agg(l.id order by l.lane desc, l.expected_at, l.pos) into chosen, ids
      from (
        select j.ctid as tid, j.id, j.priority as lane, j.expected_at, j.pos from jobs j
        where j.ctid = any(line.tids) and j.cursor_key is null and j.token is null and j.stage in ('ready', 'suspect')
        for update skip locked
      ) l;
    contended := contended or cardinality(chosen) < cardinality(array_positions(line.keys, null));

    exit when cardinality(array_remove(line.keys, null)) = 0;
    runs := own_cursors(claim_lanes.token, claim_lanes.queue, claim_lanes.kinds, cutoff, line.tids, line.keys,
      line.suspect > 0, claim_lanes.max_jobs - cardinality(chosen), claim_lanes.run_length,
      coalesce(claim_lanes.longest_run, claim_lanes.run_length), greatest(may_park, line.suspect::int));
    owned := runs.owned;
    left_at := runs.left_at;
    may_park := runs.to_park;
    contended := contended or runs.contended;
    chosen := chosen || runs.tids;
    ids := ids || runs.ids;
    -- All that was met belongs to busy cursors: others may stand behind.
    exit when cardinality(chosen) > 0;
    -- A suspect, or dated jobs, which have no mark to read past: look again when others have moved on.
    contended := contended or line.lanes is null or line.tids is not distinct from seen;
    exit when line.lanes is null or line.tids is not distinct from seen;
    seen := line.tids;
    line_lanes := line.lanes;
    line_marks := line.marks;
    contended := contended or again = reads;
  end loop;

  for n in 1 .. greatest(cardinality(line.lanes), 1) loop -- a claim of a suspect reads no lane, and has one row too
    priority := line.lanes[n];
    -- Marks must not pass a cursor that found no room.
    mark := case when left_at is null or priority > line.at_lane[left_at] then line.marks[n]
      when priority = line.at_lane[left_at] and line.at_pos[left_at] is not null then line.at_pos[left_at] - 1
      else coalesce(line_marks[array_position(line_lanes, priority)], 0) end;
    at_end := line.at_end and left_at is null;
    in_order := case when n = 1 then ids end;
    waited_ms := line.took_ms;
    return next;
  end loop;
  if cardinality(chosen) = 0 then
    return;
  end if;
  insert into claims (token, lease, queue, ids, open, losses)
    values (claim_lanes.token, claim_lanes.lease, claim_lanes.queue, ids, cardinality(ids), line.suspect);
  if owned is not null then
    return query
      select null::smallint, null::bigint, null::boolean, null::boolean, null::bigint[], null::bigint, null::tid,
        null::text, null::json, null::smallint, null::smallint, null::bigint, null::json, null::float8, null::boolean, null::boolean,
        c.key, c.state, c.version, c.turn
      from unnest(owned) o(key)
      cross join lateral (
        select * from cursors c where c.queue = claim_lanes.queue and c.key = o.key order by c.turn desc limit 1
      ) c;
  end if;
  -- Asking for the size of a column does not read it; a small one may be a large value, well compressed.
  -- least: a row that was written by hand must not stop the line. date_part: extract computes exactly, and slowly.
  return query
    update jobs j set token = claim_lanes.token, attempt = least(attempt, 32766) + 1, started_at = cutoff, collapse_key = null
    where j.ctid = any(chosen)
    returning null::smallint, null::bigint, null::boolean, null::boolean, null::bigint[], j.id, j.ctid, j.kind,
      case when pg_column_size(j.payload) <= 1000 then j.payload
        when pg_column_size(j.payload) > claim_lanes.max_inline
          or octet_length(j.payload::text) > claim_lanes.max_inline then null
        else j.payload end, j.attempt, j.max_attempts, (date_part('epoch', j.timeout) * 1000)::bigint, j.headers,
      date_part('epoch', cutoff - least(greatest(j.run_at, j.created_at), cutoff)) * 1000,
      j.on_retry is not distinct from 'pass', j.on_failure is not distinct from 'halt',
      j.cursor_key, null::json, null::bigint, null::bigint;
end $$;

-- For SQL consumers: claim up to max_jobs jobs under a lease of their own, which is also their token.
-- Settle each with settle(id, token, ...) before the lease ends, or extend it.
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
  perform check_ttl('lease_for', claim.lease_for);
  perform begin_lease(lease, current_setting('application_name'), claim.lease_for);
  return query
    with got as materialized (
      select * from claim_lanes(lease, lease, claim.queue, claim.kinds, claim.max_jobs, 1, '{}', '{}')
    )
    select lease, g.id, g.kind, g.payload, g.attempt, g.max_attempts, g.headers, g.cursor_key, c.cursor_state
    from (select h.id, h.n from got, unnest(got.in_order) with ordinality h(id, n)) l
    join got g on g.id = l.id
    left join got c on c.id is null and c.cursor_key = g.cursor_key
    order by l.n;
  if not found then
    delete from leases l where l.id = lease;
  end if;
end $$;

create or replace function new_token() returns bigint
language sql volatile set search_path from current as $$
  select ('x' || substr(replace(gen_random_uuid()::text, '-', ''), 17))::bit(64)::bigint
$$;
