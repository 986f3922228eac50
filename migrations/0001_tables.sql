-- Live jobs: everything that waits or runs. A plain INSERT or COPY enqueues; only the first group of
-- columns is meant to be written by users. What these may hold is checked when they are inserted (see arrive), and
-- not by the table, which would check it again whenever a job starts.
create type stage as enum ('scheduled', 'ready', 'blocked', 'suspect');
create type outcome as enum ('completed', 'failed', 'cancelled', 'lost');
-- What a job of a cursor does to the jobs behind it: while it waits for its next attempt, they wait too
-- or pass; after it failed for good, the cursor continues or halts until an operator resumes it.
create type on_retry as enum ('hold', 'pass');
create type on_failure as enum ('continue', 'halt');
-- A place in a mailbox: rank is the negative priority, so that places compare as rows.
create type place as (rank int, expected_at timestamptz, id bigint);
create sequence line;
-- Below this id no insert can appear any more; a register that is no row (see move_horizon).
create sequence horizon;

create table jobs (
  id bigint generated always as identity primary key,
  queue text not null default 'default',
  kind text not null,
  payload json not null default 'null',
  priority smallint not null default 0,
  expected_at timestamptz not null default 'infinity',
  run_at timestamptz not null default now(),
  max_attempts smallint not null default 25,
  timeout interval,
  cursor_key text,
  -- Null is hold and continue.
  on_retry on_retry,
  on_failure on_failure,
  -- Of the jobs of one queue and kind that have not started yet, at most one has this key.
  collapse_key text,
  headers json,
  created_at timestamptz not null default now(),
  -- Written by pgcue alone. stage: what the indexes know of the row; a claim never writes it.
  stage stage not null default 'ready',
  pos bigint not null default nextval('line'),
  attempt smallint not null default 0,
  losses smallint not null default 0,
  token bigint,
  started_at timestamptz,
  cancelled_at timestamptz,
  error text
) with (
  -- Half of each page stays free, so that a claim is a HOT update inside its page.
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 10000,
  autovacuum_vacuum_cost_delay = 1
);

-- The line: what a claim reads. Suspects (jobs that lost their node) wait apart, see read_line.
create index jobs_line on jobs (queue, priority desc, expected_at, pos) where stage = 'ready';
create index jobs_suspects on jobs (queue, priority desc, pos) where stage = 'suspect';
create index jobs_due on jobs (run_at) where stage = 'scheduled';
create index jobs_mailbox on jobs (queue, cursor_key, (-(priority::int)), expected_at, id)
  where cursor_key is not null and stage <> 'scheduled';
-- The one index that a claim takes rows out of: it clears the key of a job that starts.
create unique index jobs_collapse on jobs (queue, kind, collapse_key) where collapse_key is not null;
create index jobs_cancelled on jobs (id) where cancelled_at is not null;

-- A lane is one (queue, priority) in use; those of priority 0 go without saying. No unique index, on purpose: an
-- enqueuer never waits for another one. Duplicates are harmless and are swept (tend_history).
create table lanes (queue text not null, priority smallint not null);
create index lanes_key on lanes (queue, priority);

-- At or before its floor no job of a lane stands, or ever will: reading begins behind, past the dead entries that a long
-- snapshot keeps. Raised in leaps (raise_floors): of a row that changes often such a snapshot would keep every version.
create table floors (queue text, priority smallint, pos bigint not null default 0, primary key (queue, priority))
  with (fillfactor = 50);

create table queues (
  name text primary key,
  paused_at timestamptz,
  -- Jobs that complete leave their row in the history from then on; infinity: not at all.
  history_from timestamptz not null default '-infinity'
);

-- One row for each living node, or for each claim of an SQL consumer (then id = the claim's token).
create table leases (
  id bigint primary key,
  node text not null,
  -- What it serves, for people who wonder why a job does not run; null: whatever is there.
  queues text[],
  kinds text[],
  started_at timestamptz not null default clock_timestamp(),
  seen_at timestamptz not null default clock_timestamp(),
  ttl interval not null,
  expires_at timestamptz not null,
  dead_at timestamptz
) with (fillfactor = 50);

create table claims (
  token bigint primary key,
  lease bigint not null,
  queue text not null,
  ids bigint[] not null,
  -- How many of ids are not settled yet; the row goes when it reaches zero.
  open int not null,
  -- The losses of the suspect that was claimed alone; 0 for an ordinary batch.
  losses smallint not null
) with (fillfactor = 50, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);
alter table claims alter ids set storage external; -- compressing them costs more than it saves
create index claims_lease on claims (lease);

-- Which cursors there are. Apart from what changes, so that being unique costs a change nothing.
-- made_at: from when on the history is this cursor's, and not one's that was deleted.
create table cursor_keys (
  queue text not null, key text not null, made_at timestamptz not null default clock_timestamp(), primary key (queue, key)
);

create table cursors (
  queue text not null,
  key text not null,
  state json,
  -- How many jobs completed, or left a state when they failed.
  version bigint not null default 0,
  -- How often it was owned, changed by an operator, or let go of with jobs that go back.
  turn bigint not null default nextval('line'), -- a cursor that was deleted and comes back begins elsewhere
  -- The claim that runs this cursor's jobs now, and the retrying job that must come first.
  owner bigint,
  hold bigint,
  -- Since when no job of it starts, and the job whose failure was the reason; null: an operator.
  halted_at timestamptz,
  halted_by bigint,
  -- Of the mark's priority and expected_at, no job with a smaller id is in the mailbox: reading starts
  -- here, past the dead entries of what was settled. After a run that is settled whole it moves to
  -- next_mark.
  mark place not null default row(-40000, '-infinity', 0),
  next_mark place not null default row(-40000, '-infinity', 0)
) with (fillfactor = 50);
-- A cursor is looked up by its newest turn: `order by turn desc limit 1` never visits the versions that a
-- pinned snapshot keeps.
create index cursors_turn on cursors (queue, key, turn desc);

-- History, partitioned by the moment of the end. The default partition keeps a settle writable even
-- if nobody has made partitions for weeks.
create table finished_jobs (
  id bigint not null,
  queue text not null,
  kind text not null,
  state outcome not null,
  payload json not null,
  result json,
  error text,
  priority smallint not null,
  expected_at timestamptz not null,
  run_at timestamptz not null,
  attempt smallint not null,
  max_attempts smallint not null,
  losses smallint not null,
  timeout interval,
  cursor_key text,
  cursor_snapshot json,
  cursor_version bigint,
  headers json,
  created_at timestamptz not null,
  started_at timestamptz,
  finished_at timestamptz not null
) partition by range (finished_at);
-- Rows arrive nearly in the order of their ids: a block range index finds one, for a tenth of the price. Its new ranges are
-- summarized by tend_history: autosummarize takes 256 requests a minute, and logs each other one with its statement.
create index finished_jobs_id on finished_jobs using brin (id) with (pages_per_range = 16);
-- No partition is vacuumed for what was inserted: that would write each page once more, of a day that is dropped in the end.
create table finished_jobs_default partition of finished_jobs default with (autovacuum_vacuum_insert_threshold = -1);
