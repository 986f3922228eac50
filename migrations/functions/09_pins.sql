-- Plans are pinned: statistics of a queue are always stale, and a plan that was made on an empty table
-- lives on for as long as its session. Rows come by index or ctid in nested loops, in the order of the
-- line; jit is off because a disabled plan's penalty counts as its cost. Set once, on the functions that
-- are called from outside; those that they call run under the same settings.
do $$
declare
  entry regprocedure;
begin
  for entry in
    select p.oid from pg_proc p
    where p.pronamespace = (select n.oid from pg_namespace n where n.nspname = current_schema()) and p.proname = any('{
      claim_lanes, claim, settle, give_back, end_lease, extend, reap, cancel, promote, move_horizon,
      halt_cursor, resume_cursor, release_cursor, skip_cursor, set_cursor_state, delete_cursor, lock_cursor, why, repair}')
  loop
    execute format('alter function %s
      set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set enable_hashjoin = off
      set enable_mergejoin = off set enable_material = off set jit = off set plan_cache_mode = force_generic_plan', entry);
  end loop;
end $$;
